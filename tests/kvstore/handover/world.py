"""Both cores, joined by a link that loses, repeats and reorders, over pages that notice every wrong touch."""

import random
from dataclasses import dataclass, field

from common.errors import OutOfPages
from common.ids import Incarnation, Owner, PeerId, RequestId, TransferId
from common.messages import decode, encode
from common.messages.actions import Send
from common.messages.handover import Grant, GrantRequest, KvSent, KvSpan
from common.messages.requests import Sampling
from common.policy.transfer import Granularity
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
from kvstore.handover.outgoing import FirstToken, Way
from kvstore.handover.receiver import Receiver
from kvstore.handover.sender import Sender
from kvstore.index.ledger import Ledger, PageState

P, D, GATEWAY = PeerId("prefill@1"), PeerId("decode@1"), PeerId("gateway@1")
EPOCH = Incarnation(7)
LAYERS = 3
Mark = tuple[TransferId, int, int, int]
"""Transfer, layer, block, and how often it had been computed."""


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
    source: dict[tuple[int, int], int] = field(default_factory=dict)
    """(layer, block) -> how often computed."""
    finished: bool = False
    source_releases: int = 0
    ends: list[str] = field(default_factory=list)


def pairs(span: KvSpan) -> list[tuple[int, int]]:
    """(layer, block) in the order of a span's pages."""
    blocks = range(span.first_block, span.first_block + span.n_blocks)
    return [(layer, block) for block in blocks for layer in range(span.layer, span.layer + span.n_layers)]


@dataclass
class World:
    """Shells of both sides, reduced to bookkeeping and assertions."""

    rng: random.Random
    loss: float = 0.15
    repeat: float = 0.1
    copy_failure: float = 0.02
    now_ms: float = 0.0
    sender: Sender = field(default_factory=lambda: Sender(LAYERS, max_copy_pages=5))
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
    payload: tuple[Mark, ...] = ()

    def __post_init__(self) -> None:
        self.receiver.on_peer_joined(P)

    def start(
        self, name: str, n_blocks: int, first_block: int, transport: str, mode: Granularity = Granularity.LAYER
    ) -> None:
        transfer = TransferId(name)
        job = self.jobs[transfer] = Job(n_blocks, first_block, transport)
        half = n_blocks // 2  # the first half was cached, or is one of two chunks of prefill
        if half and self.rng.random() < 0.5:
            job.to_compute.append(KvSpan(0, 0, half, LAYERS))
        elif half:
            job.to_compute += [KvSpan(layer, 0, half) for layer in range(LAYERS)]
        job.to_compute += [KvSpan(layer, half, n_blocks - half) for layer in range(LAYERS)]
        if transport == "shm":  # some of it is computed twice, as when it could not be loaded
            again = self.rng.randrange(len(job.to_compute) + 1)
            job.to_compute[again:again] = job.to_compute[:again]
        asked = self.sender.ask(D, request(transfer, transport), n_blocks, self.now_ms, self.now_ms + 60_000, Way(mode))
        self.perform_sender(asked)

    # Prefill side.

    def perform_sender(self, actions: list[SenderAction]) -> None:
        for action in actions:
            match action:
                case Send(to, message):
                    assert to == D
                    self.send(D, encode(message), self.payload if isinstance(message, KvSent) else ())
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
            span = job.to_compute.pop(0)
            for layer, block in pairs(span):
                job.source[layer, block] = job.source.get((layer, block), 0) + 1
            self.perform_sender(self.sender.computed(transfer, span))
        elif not job.finished:
            job.finished = True
            self.perform_sender(self.sender.finished(transfer, FirstToken(token=5), self.now_ms))

    def end_copy(self) -> None:
        copy = self.flying.pop(self.rng.randrange(len(self.flying)))
        ok = self.rng.random() >= self.copy_failure
        job = self.jobs[copy.transfer]
        marks = [(copy.transfer, *pair, job.source[pair]) for pair in pairs(copy.span)]
        if job.transport == "shm" and self.receiver_alive:
            for mark, page in zip(marks, copy.target_pages, strict=True):
                owner = self.ledger.state_of(Owner(copy.transfer))
                assert owner in (PageState.GRANTED, PageState.QUARANTINED), f"write into {owner} pages"
                assert page in self.ledger.pages_of(Owner(copy.transfer))
                self.memory[page] = mark
        self.payload = tuple(marks) if job.transport == "tcp" else ()
        self.perform_sender(self.sender.copied(copy.transfer, copy.span, self.now_ms, ok=ok))
        self.payload = ()

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
                    assert payload == 0, "one span per message"
                    assert [mark[1:3] for mark in marks] == pairs(span)
                    self.memory.update(zip(pages, marks, strict=True))
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
                block = job.first_block + place
                mark = (transfer, layer, block, job.source[layer, block])
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
            pages = self.ledger.alloc(Owner(transfer), n_blocks * LAYERS, PageState.GRANTED).tolist()
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
