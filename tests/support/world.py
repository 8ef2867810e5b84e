"""A prefill and a decode core in one pure world: scripted time, links that keep order, a random scheduler of events.

What a shell does (carry messages, compute steps, copy pages) happens here as events in random order; processes can die
and come back. KV is modelled as the token block it was computed from, so a wrong page shows as a wrong block.
"""

import random
from collections import deque
from dataclasses import dataclass, field

from common.ids import Incarnation, PeerId, RequestId, WorkerId, peer_id
from common.kv_layout import KvLayout
from common.messages.actions import Dial, HangUp, Send
from common.messages.liveness import Hello, Member, Ping, TransportReport
from common.messages.requests import Cancel, Failed, Generate, Sampling, TokenDelta, Tokens
from common.policy.batching import DecodeFirst
from kvstore.handover.actions import Fill
from kvstore.handover.receiver import Receiver
from kvstore.handover.sender import Sender
from kvstore.index.ledger import Ledger
from services.worker.core.actions import Action, Copy, OpenChannel
from services.worker.core.callers import Callers
from services.worker.core.decode import DecodeCore
from services.worker.core.generation import Generation
from services.worker.core.incoming import GrantTerms, Incoming
from services.worker.core.neighbours import Neighbours
from services.worker.core.plan import StepPlan
from services.worker.core.prefill import PrefillCore
from services.worker.core.role import Parts
from services.worker.core.scheduler import Scheduler
from tests.support.fake_engine import FakeEngine

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=8, dtype="float32", block_tokens=4)
GATEWAY = PeerId("gateway@1")
SILENT_MS = 3_000.0


@dataclass
class Process:
    """One life of a worker."""

    peer: PeerId
    core: PrefillCore | DecodeCore
    ledger: Ledger
    step: StepPlan | None = None
    copies: deque[Copy] = field(default_factory=deque)
    alive: bool = True


@dataclass
class Answer:
    """What the gateway saw of one request."""

    prompt: list[int]
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    failed: Failed | None = None
    cancelled: bool = False
    deltas: list[TokenDelta] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.cancelled or self.finish is not None or self.failed is not None


class World:
    """`transport` is shm (the copy writes the peer's pages) or tcp (the receiver does)."""

    def __init__(self, rng: random.Random, *, prefill_pages: int, decode_pages: int, transport: str = "shm") -> None:
        self.rng, self.transport = rng, transport
        self.now_ms = 0.0
        self.links: dict[tuple[PeerId, PeerId], deque] = {}
        self.lost: list[tuple[PeerId, object]] = []
        self.answers: dict[RequestId, Answer] = {}
        self.lives = 0
        self.engine = FakeEngine(layers=2, block_tokens=4)
        self.pages = {"prefill": prefill_pages, "decode": decode_pages}
        self.processes: dict[str, Process] = {}
        self.start("decode")
        self.start("prefill")

    def start(self, role: str) -> None:
        self.lives += 1
        mine = Member(
            id=WorkerId(f"{role}-0"), role=role, incarnation=Incarnation(self.lives), endpoint="x", host="h", pid=1
        )
        ledger = Ledger(self.pages[role])
        scheduler = Scheduler(ledger, LAYOUT, DecodeFirst(12, 4), max_running=5)
        parts = Parts(ledger, scheduler, Callers(mine, silent_ms=SILENT_MS))
        core: PrefillCore | DecodeCore
        if role == "prefill":
            neighbours = Neighbours(mine, silent_ms=SILENT_MS)
            core = PrefillCore(mine, parts, Sender(2), neighbours, LAYOUT, max_queued=100)
        else:
            generation = Generation(scheduler, context_tokens=1000)
            incoming = Incoming(
                Receiver(mine.incarnation, 2),
                ledger,
                scheduler,
                generation,
                GrantTerms(LAYOUT, mine.incarnation, 30_000),
            )
            core = DecodeCore(mine, parts, generation, incoming, max_queued=100)
        self.processes[role] = Process(peer_id(mine.id, mine.incarnation), core, ledger)
        self.members = [m for m in getattr(self, "members", []) if m.role != role] + [mine]
        for process in self.processes.values():
            if process.alive:
                self.perform(process, process.core.on_members(self.members, self.now_ms))

    def kill(self, role: str) -> None:
        """kill -9, seen at once by the kernel's end-of-file on the other side; messages on the way are lost."""
        victim = self.processes[role]
        victim.alive = False
        for link in [link for link in self.links if victim.peer in link]:
            del self.links[link]
        for answer in self.answers.values():  # the gateway notices by silence
            if not answer.done:
                answer.failed = Failed(request=RequestId(""), code="peer_failed", phase="?", text="", retryable=True)
        for request in self.answers:
            self.cancel(request)
        for process in self.processes.values():
            if process.alive:
                self.perform(process, process.core.on_peer_dead(victim.peer, self.now_ms))

    # -- the gateway

    def send(
        self,
        name: str,
        prompt: list[int],
        max_tokens: int,
        *,
        timeout_ms: int = 10**6,
        stop_token_ids: tuple[int, ...] = (),
    ) -> None:
        sampling = Sampling(max_tokens=max_tokens, stop_token_ids=stop_token_ids)
        message = self.generate(name, prompt, sampling, timeout_ms=timeout_ms)
        self.post(GATEWAY, self.processes["prefill"].peer, message)

    def generate(
        self, name: str, prompt: list[int], sampling: Sampling, *, decode: str = "decode-0", timeout_ms: int = 10**6
    ) -> Generate:
        request = RequestId(name)
        self.answers[request] = Answer(prompt, sampling.max_tokens)
        return Generate(
            request=request, prompt=tuple(prompt), sampling=sampling, timeout_ms=timeout_ms, decode=WorkerId(decode)
        )

    def cancel(self, request: RequestId) -> None:
        self.answers[request].cancelled = True
        for process in self.processes.values():
            self.post(GATEWAY, process.peer, Cancel(request=request))

    def hear(self, message: object) -> None:
        match message:
            case Tokens(deltas=deltas):
                for delta in deltas:
                    answer = self.answers[delta.request]
                    assert answer.done or delta.position == len(answer.tokens)
                    answer.deltas.append(delta)
                    answer.tokens += delta.tokens
                    answer.finish = delta.finish
            case Failed(request=request):
                if not self.answers[request].done:
                    self.answers[request].failed = message

    # -- the shells

    def post(self, source: PeerId, target: PeerId, message: object) -> None:
        self.links.setdefault((source, target), deque()).append(message)

    def unheard(self, peer: PeerId) -> list[object]:
        """Messages to somebody who is not there."""
        return [message for target, message in self.lost if target == peer]

    def process(self, peer: PeerId) -> Process | None:
        return next((p for p in self.processes.values() if p.peer == peer and p.alive), None)

    def perform(self, process: Process, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(to, message):
                    self.post(process.peer, to, message)
                case Copy():
                    process.copies.append(action)
                case OpenChannel(peer=peer):
                    report = TransportReport(peer=peer, kind=self.transport, gib_per_s=1.0)
                    self.perform(process, process.core.on_channel(report, self.now_ms))
                case Dial() | HangUp() | Fill():
                    pass
        if process.step is None:
            process.step = process.core.plan()
            if process.step is not None and process.alive:
                self.layer_events(process)

    def layer_events(self, process: Process) -> None:
        if any(segment.streamed for segment in process.step.segments):
            for layer in range(LAYOUT.layers):
                self.perform(process, process.core.on_layer(layer, self.now_ms))

    def turn(self) -> bool:
        """One random event; False if nothing can happen but the passing of time."""
        choices: list[tuple[str, object]] = [("link", link) for link, queue in self.links.items() if queue]
        for process in self.processes.values():
            if process.alive and process.step is not None:
                choices.append(("step", process))
            if process.alive and process.copies:
                choices.append(("copy", process))
        if not choices:
            return False
        self.now_ms += self.rng.choice([0.0, 0.1, 1.0])
        kind, what = self.rng.choice(choices)
        if kind == "link":
            self.carry(what)
        elif kind == "step":
            step, what.step = what.step, None
            self.perform(what, what.core.on_step(self.engine.step(step, None), self.now_ms))
        else:
            copy = what.copies.popleft()
            self.perform(
                what,
                what.core.on_copied(copy.order.transfer, copy.order.span, ok=True, elapsed_ms=1.0, now_ms=self.now_ms),
            )
        return True

    def carry(self, link: tuple[PeerId, PeerId]) -> None:
        message = self.links[link].popleft()
        source, target = link
        if target == GATEWAY:
            self.hear(message)
            return
        process = self.process(target)
        if process is None:
            self.lost.append((target, message))
        else:
            self.perform(process, process.core.on_message(source, message, self.now_ms))

    def pass_time(self, ms: float) -> None:
        """Everybody pings and ticks."""
        self.now_ms += ms
        for process in self.processes.values():
            if process.alive:
                self.post(GATEWAY, process.peer, Ping(sequence=1))
                self.perform(process, process.core.on_tick(self.now_ms))

    def settle(self) -> None:
        """Run until nothing is in flight and everybody is idle."""
        for _ in range(400):
            while self.turn():
                pass
            if all(p.core.idle for p in self.processes.values() if p.alive):
                return
            self.pass_time(400.0)
        raise AssertionError(f"never idle: {self.answers}")

    def greet(self) -> None:
        """The gateway's Hello, and time for the cores to find each other."""
        mine = Member(id=WorkerId("gateway"), role="gateway", incarnation=Incarnation(1), endpoint="", host="", pid=1)
        for process in self.processes.values():
            self.post(GATEWAY, process.peer, Hello(member=mine))
        self.pass_time(1.0)
        while self.turn():
            pass
