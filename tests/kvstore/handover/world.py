"""Both cores, joined by a link that loses, repeats and reorders, over pages that notice every wrong touch."""

import random
from dataclasses import dataclass, field

from common.errors import OutOfPages
from common.ids import Incarnation, Owner, PeerId, RequestId, TransferId
from common.messages import decode, encode
from common.messages.actions import Send
from common.messages.handover import Grant, GrantRequest, KvSent, KvSpan
from common.messages.requests import Sampling
from kvstore.handover.actions import (
    Asked,
    Deliver,
    Fill,
    GaveUp,
    Granted,
    HandedOver,
    PostCopy,
    Quarantine,
    ReceiverAction,
    Release,
    SenderAction,
)
from kvstore.handover.outgoing import FirstToken
from kvstore.handover.receiver import Receiver
from kvstore.handover.sender import Sender
from kvstore.index.ledger import Ledger, PageState

P, D, GATEWAY = PeerId("prefill@1"), PeerId("decode@1"), PeerId("gateway@1")
EPOCH = Incarnation(7)
LAYERS = 3
Mark = tuple[TransferId, int, int]


def request(transfer: TransferId, transport: str = "shm", timeout_ms: int = 60_000) -> GrantRequest:
    return GrantRequest(
        transfer=transfer,
        request=RequestId(f"r-{transfer}"),
        gateway=GATEWAY,
        prompt=(1, 2, 3),
        sampling=Sampling(max_tokens=4),
        timeout_ms=timeout_ms,
        transport=transport,
    )


@dataclass
class Job:
    """One request of the prefill side."""

    n_blocks: int
    first_block: int
    transport: str
    to_compute: list[KvSpan] = field(default_factory=list)
    finished: bool = False
    source_releases: int = 0
    ends: list[str] = field(default_factory=list)


@dataclass
class World:
    """Shells of both sides, reduced to bookkeeping and assertions."""

    rng: random.Random
    loss: float = 0.15
    repeat: float = 0.1
    copy_failure: float = 0.02
    now_ms: float = 0.0
    sender: Sender = field(default_factory=lambda: Sender(LAYERS))
    receiver: Receiver = field(default_factory=lambda: Receiver(EPOCH, LAYERS))
    ledger: Ledger = field(default_factory=lambda: Ledger(60))
    wire: list[tuple[PeerId, bytes, tuple[Mark, ...]]] = field(default_factory=list)
    flying: list[PostCopy] = field(default_factory=list)
    memory: dict[int, Mark] = field(default_factory=dict)
    jobs: dict[TransferId, Job] = field(default_factory=dict)
    waiting: list[Asked] = field(default_factory=list)
    opened: set[TransferId] = field(default_factory=set)
    delivered: list[TransferId] = field(default_factory=list)
    target_releases: list[TransferId] = field(default_factory=list)
    receiver_gave_up: list[TransferId] = field(default_factory=list)
    sender_alive: bool = True
    receiver_alive: bool = True
    payload: Mark | None = None

    def start(self, name: str, n_blocks: int, first_block: int, transport: str) -> None:
        transfer = TransferId(name)
        job = self.jobs[transfer] = Job(n_blocks, first_block, transport)
        half = n_blocks // 2  # two chunks of prefill, layer by layer
        for low, high in ((0, half), (half, n_blocks)):
            job.to_compute += [KvSpan(layer, low, high - low) for layer in range(LAYERS) if high > low]
        asked = self.sender.ask(D, request(transfer, transport), n_blocks, self.now_ms, self.now_ms + 60_000)
        self.perform_sender(asked)

    # Prefill side.

    def perform_sender(self, actions: list[SenderAction]) -> None:
        for action in actions:
            match action:
                case Send(to, message):
                    assert to == D
                    marks = (self.payload,) if isinstance(message, KvSent) and self.payload else ()
                    self.send(D, encode(message), tuple(mark for mark in marks if mark))
                case PostCopy():
                    job = self.jobs[action.transfer]
                    assert job.source_releases == 0, "copy started from released pages"
                    assert action.span.first_block >= job.first_block, "copied what is there already"
                    self.flying.append(action)
                case HandedOver(transfer):
                    self.jobs[transfer].ends.append("handed over")
                case GaveUp(transfer):
                    self.jobs[transfer].ends.append("gave up")
                case Release(transfer):
                    assert not [copy for copy in self.flying if copy.transfer == transfer], "released while reading"
                    self.jobs[transfer].source_releases += 1
                case Granted(transfer, first_block):
                    assert first_block == self.jobs[transfer].first_block
        self.sender.check()

    def compute(self) -> None:
        transfer = self.rng.choice(list(self.jobs))
        job = self.jobs[transfer]
        if job.to_compute:
            self.perform_sender(self.sender.computed(transfer, job.to_compute.pop(0)))
        elif not job.finished:
            job.finished = True
            self.perform_sender(self.sender.finished(transfer, FirstToken(token=5), self.now_ms))

    def end_copy(self) -> None:
        copy = self.flying.pop(self.rng.randrange(len(self.flying)))
        ok = self.rng.random() >= self.copy_failure
        job = self.jobs[copy.transfer]
        if job.transport == "shm" and self.receiver_alive:
            for place, page in enumerate(copy.target_pages):
                owner = self.ledger.state_of(Owner(copy.transfer))
                assert owner in (PageState.GRANTED, PageState.QUARANTINED), f"write into {owner} pages"
                assert page in self.ledger.pages_of(Owner(copy.transfer))
                self.memory[page] = (copy.transfer, copy.span.layer, copy.span.first_block + place)
        self.payload = (copy.transfer, copy.span.layer, copy.span.first_block) if job.transport == "tcp" else None
        self.perform_sender(self.sender.copied(copy.transfer, copy.span, self.now_ms, ok=ok))
        self.payload = None

    # Decode side.

    def perform_receiver(self, actions: list[ReceiverAction], marks: tuple[Mark, ...] = ()) -> None:
        for action in actions:
            match action:
                case Send(to, message):
                    assert to == P
                    self.send(P, encode(message), ())
                case Asked():
                    self.waiting.append(action)
                case Fill(transfer, span, pages, payload):
                    assert self.ledger.state_of(Owner(transfer)) is PageState.GRANTED, "payload into foreign pages"
                    assert marks[payload] == (transfer, span.layer, span.first_block)
                    for place, page in enumerate(pages):
                        self.memory[page] = (transfer, span.layer, span.first_block + place)
                case Deliver(transfer):
                    self.deliver(transfer)
                case Quarantine(transfer):
                    self.ledger.move(Owner(transfer), PageState.QUARANTINED)
                case Release(transfer):
                    flying = [copy for copy in self.flying if copy.transfer == transfer]
                    shared = self.jobs[transfer].transport == "shm"
                    assert not (flying and shared and self.sender_alive), "released while a writer writes"
                    self.ledger.free(Owner(transfer))
                    self.target_releases.append(transfer)
                case GaveUp(transfer):
                    self.receiver_gave_up.append(transfer)
        self.receiver.check()
        self.ledger.check()

    def deliver(self, transfer: TransferId) -> None:
        job = self.jobs[transfer]
        pages, n_blocks = self.ledger.pages_of(Owner(transfer)), job.n_blocks - job.first_block
        for layer in range(LAYERS):
            for place in range(n_blocks):
                mark = (transfer, layer, job.first_block + place)
                assert self.memory.get(pages[layer * n_blocks + place]) == mark, "delivered without its KV"
        self.ledger.rename(Owner(transfer), Owner(f"request-{transfer}"))
        self.ledger.move(Owner(f"request-{transfer}"), PageState.ACTIVE)
        self.delivered.append(transfer)

    def grant(self) -> None:
        asked = self.waiting.pop(self.rng.randrange(len(self.waiting)))
        transfer = asked.request.transfer
        job = self.jobs[transfer]
        n_blocks = job.n_blocks - job.first_block
        try:
            pages = self.ledger.alloc(Owner(transfer), n_blocks * LAYERS, PageState.GRANTED)
        except OutOfPages:
            refusal = self.receiver.refuse(transfer, "out_of_pages", "no pages", True, self.now_ms)
            return self.perform_receiver(refusal)
        rows = tuple(tuple(pages[row * n_blocks : (row + 1) * n_blocks]) for row in range(LAYERS))
        offer = Grant(transfer=transfer, epoch=EPOCH, first_block=job.first_block, pages=rows, lease_ms=30_000)
        self.opened.add(transfer)
        return self.perform_receiver(self.receiver.open(P, offer, job.transport == "shm", self.now_ms))

    def end_a_running_request(self) -> None:
        running = list(self.ledger.owners(PageState.ACTIVE))
        if running:
            owner = self.rng.choice(running)
            for page in self.ledger.pages_of(owner):
                self.memory.pop(page, None)
            self.ledger.free(owner)

    # The link, time and death.

    def send(self, to: PeerId, frame: bytes, marks: tuple[Mark, ...]) -> None:
        if self.rng.random() >= self.loss:
            self.wire.append((to, frame, marks))
        if self.rng.random() < self.repeat:
            self.wire.append((to, frame, marks))

    def arrive(self) -> None:
        to, frame, marks = self.wire.pop(self.rng.randrange(len(self.wire)))
        if to == D and self.receiver_alive:
            self.perform_receiver(self.receiver.on_message(P, decode(frame), self.now_ms), marks)
        elif to == P and self.sender_alive:
            self.perform_sender(self.sender.on_message(D, decode(frame), self.now_ms))

    def wait(self, passed_ms: float) -> None:
        self.now_ms += passed_ms
        if self.sender_alive:
            self.perform_sender(self.sender.on_tick(self.now_ms))
        if self.receiver_alive:
            self.perform_receiver(self.receiver.on_tick(self.now_ms))

    def kill_sender(self) -> None:
        self.sender_alive = False
        self.flying.clear()
        self.wire = [letter for letter in self.wire if letter[0] == D]
        self.perform_receiver(self.receiver.on_peer_dead(P, self.now_ms))

    def kill_receiver(self) -> None:
        self.receiver_alive = False
        self.waiting.clear()
        self.perform_sender(self.sender.on_peer_dead(D))

    def step(self) -> None:
        """One thing that may happen next, chosen by chance."""
        possible = [lambda: self.wait(self.rng.choice([0.0, 10.0, 400.0, 3_000.0]))]
        if self.wire:
            possible += [self.arrive] * 6
        if self.flying:
            possible += [self.end_copy] * 4
        if self.waiting:
            possible += [self.grant] * 3
        if self.sender_alive:
            possible += [self.compute] * 4
        if self.receiver_alive:
            possible.append(self.end_a_running_request)
        self.rng.choice(possible)()

    def drain(self) -> None:
        """No new work; the link loses no more than half. Raises AssertionError if anything is open at the end."""
        for _ in range(20_000):
            busy = (self.sender_alive and self.sender.open_transfers) or self.flying
            if not busy and not (self.receiver_alive and self.receiver.open_transfers):
                return
            self.step()
        raise AssertionError(f"still open: {self.sender.open_transfers}, {self.receiver.open_transfers}")
