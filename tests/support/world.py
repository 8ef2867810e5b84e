"""Cores of workers, and of a KV store, in one pure world: scripted time, links that keep order, random order of events.

What a shell does (carry messages, compute steps, copy pages) happens here as events in random order; processes can die
and come back. KV is modelled as what it was computed from (tests.support.world_memory).
"""

import random
from collections import deque
from collections.abc import Mapping, Sized
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import msgspec

from common.ids import Incarnation, Owner, PeerId, RequestId, WorkerId, peer_id
from common.kv_layout import KvLayout
from common.messages.actions import Dial, HangUp, Send
from common.messages.handover import KvSent
from common.messages.liveness import Hello, Member, ModelIdentity, Ping, TransportReport
from common.messages.requests import Cancel, Failed, Generate, Sampling, TokenDelta, Tokens
from common.messages.resizing import Resize, ResizeAnswer
from common.policy.elastic import ArenaTerms
from kvstore.handover.actions import Fill
from kvstore.index.ledger import Ledger
from services.worker.build_core import build_core
from services.worker.build_parts import Machine
from services.worker.core.actions import (
    Action,
    BeginRing,
    Copy,
    FetchBlocks,
    FillBlocks,
    LendChunks,
    Moved,
    OpenChannel,
    OpenRing,
    ResizeMemory,
    SendBlocks,
    StoreBlocks,
    TakeBackChunks,
)
from services.worker.core.decode import DecodeCore
from services.worker.core.elastic import ACTIVATIONS
from services.worker.core.host_buffer import HOST_BUFFER
from services.worker.core.plan import StepPlan, StepResult
from services.worker.core.prefill import PrefillCore
from services.worker.core.resizing import PoolSize
from services.worker.settings import WorkerSettings
from tests.support.world_memory import Memory, MemoryEngine, Page
from tests.support.world_store import Store

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=8, dtype="float32", block_tokens=4)
GATEWAY = PeerId("gateway@1")
SILENT_MS = 3_000.0
CHUNK_PAGES = 4
MODEL = ModelIdentity(
    name="m",
    fingerprint="f",
    architecture="a",
    dtype="float32",
    layers=2,
    kv_heads=1,
    head_dim=8,
    block_tokens=4,
    vocab_tokens=1000,
    context_tokens=1000,
)


def pages_of_chunk(chunk: int) -> range:
    return range(chunk * CHUNK_PAGES, (chunk + 1) * CHUNK_PAGES)


@dataclass
class Process:
    """One life of a worker."""

    peer: PeerId
    core: PrefillCore | DecodeCore
    ledger: Ledger
    memory: Memory
    max_running: int
    context_tokens: int
    host: Memory
    """Its host buffer."""
    steps: deque[StepPlan] = field(default_factory=deque)
    """Planned and not computed."""
    results: deque[StepResult] = field(default_factory=deque)
    """Computed, and not told yet: only when steps are planned ahead."""
    layer: int = 0
    """Of the first step, to be computed next."""
    untold: int = 0
    """Layers of it that were computed and not told yet."""
    wrong: set[str] = field(default_factory=set)
    copies: deque[Copy] = field(default_factory=deque)
    payloads: dict[tuple[object, object], list[Page]] = field(default_factory=dict)
    arena: list[int] = field(default_factory=list)
    """Chunks that serve steps, in order."""
    refills: deque[tuple[int, ...]] = field(default_factory=deque)
    """Chunks that the system was asked for."""
    resizes: deque[int] = field(default_factory=deque)
    """Pages that there shall be memory for."""
    moves: deque["Move"] = field(default_factory=deque)
    rings: dict[int, int] = field(default_factory=dict)
    """Up to which layer the engine may write those that have not ended."""
    alive: bool = True

    @property
    def step(self) -> StepPlan | None:
        """What is computed now."""
        return self.steps[0] if self.steps else None


Happens = tuple[PeerId, PeerId] | Process
"""To whom: a link that carries a message, or a process."""


@dataclass
class Move:
    """A job of the block mover: one layer, or all of it, at a time."""

    order: FetchBlocks | StoreBlocks
    next_layer: int = 0
    """Column of the order's pages."""
    broken: bool = False

    @property
    def first_missing(self) -> int:
        layers = self.order.layers if isinstance(self.order, FetchBlocks) else ()
        return layers[self.next_layer] if layers else self.next_layer


@dataclass
class Answer:
    """What the gateway saw of one request."""

    prompt: list[int]
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    """Beginning with what was emitted before."""
    finish: str | None = None
    failed: Failed | None = None
    cancelled: bool = False
    deltas: list[TokenDelta] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.cancelled or self.finish is not None or self.failed is not None


class World:
    """`transport` is shm (the copy writes the peer's pages) or tcp (the receiver does)."""

    def __init__(
        self,
        rng: random.Random,
        *,
        prefill_pages: int,
        decode_pages: int,
        transport: str = "shm",
        store_blocks: int = 0,
        flaky: float = 0.0,
        flaky_maps: float = 0.0,
        ahead: bool = False,
        more: tuple[str, ...] = (),
        context_tokens: Mapping[str, int] = MappingProxyType({}),
        host_pages: int = 0,
        layers: int = 2,
        arena: ArenaTerms | None = None,
        **settings: object,
    ) -> None:
        """`store_blocks`: host memory of a KV store, 0 for none. `flaky`: part of the block moves that fail. `flaky_maps`: part of
        the moves of chunks that the system does not bear. `more`:
        workers beside `decode` and `prefill`, such as `prefill-1`. `ahead`: plan the next step while one runs, and hear of
        the end of a step some time after it. `context_tokens`: role -> what its workers take, where that is less than what
        the model takes. `host_pages`: of every worker's host buffer. `arena`: what steps need, with elastic.
        `settings`: of WorkerSettings."""
        self.arena, self.moved_chunks = arena, {"lent": 0, "returned": 0, "refused": 0}
        self.rng, self.transport, self.flaky, self.settings = rng, transport, flaky, settings
        self.flaky_maps = flaky_maps
        self.layout = replace(LAYOUT, layers=layers)
        self.ahead, self.context_tokens, self.now_ms = ahead, context_tokens, 0.0
        self.links: dict[tuple[PeerId, PeerId], deque[Any]] = {}
        """Messages with their payloads, as `post` put them there."""
        self.lost: list[tuple[PeerId, object]] = []
        self.resized: list[ResizeAnswer] = []
        self.answers: dict[RequestId, Answer] = {}
        self.lives = 0
        self.engine = MemoryEngine(layers=layers, block_tokens=4)
        self.store_blocks = store_blocks
        self.store: Store | None = None
        self.machine_pages, self.host_pages = 10**6, host_pages
        self.pages = {"prefill": prefill_pages, "decode": decode_pages}
        self.processes: dict[str, Process] = {}
        self.members: list[Member] = []
        if store_blocks:
            self.start_store()
        for name in ("decode", "prefill", *more):
            self.start(name)

    def start(self, name: str) -> None:
        """`prefill`: that is prefill-0."""
        self.lives += 1
        role, _, number = name.partition("-")
        mine = Member(
            id=WorkerId(f"{role}-{number or 0}"),
            role=role,
            incarnation=Incarnation(self.lives),
            endpoint="x",
            host="h",
            pid=1,
            model=msgspec.structs.replace(MODEL, layers=self.layout.layers),
            context_tokens=self.context_tokens.get(role),
        )
        settings = WorkerSettings(
            model="m",
            **{
                "max_running": 5,
                "max_step_tokens": 16,
                "max_queued": 100,
                "silent_peer_ms": 3_000,
                "fetch": "always",
                **self.settings,
            },  # type: ignore[arg-type]  # a test's keywords
        )
        pages = self.pages["prefill" if role == "prefill" else "decode"]
        size = PoolSize(pages, CHUNK_PAGES, self.layout.page_bytes, self.host_pages)
        core = build_core(mine, settings, Machine(size=size, layout=self.layout, arena=self.arena))
        assert isinstance(core, PrefillCore | DecodeCore)
        memory = Memory(4, n_pages=pages)
        peer, limits = peer_id(mine.id, mine.incarnation), (settings.running_limit, mine.takes_tokens)
        host = Memory(4, n_pages=self.host_pages)
        process = self.processes[name] = Process(peer, core, core.pool.ledger, memory, *limits, host)
        core.move_chunks_with(lambda order: self.move_chunks(process, order))
        self.members = [m for m in self.members if m.id != mine.id] + [mine]
        self.tell_members()

    def start_store(self) -> None:
        """A KV store's new life."""
        self.lives += 1
        self.store = Store(self.lives, self.layout, self.store_blocks)
        self.members = [m for m in self.members if m.role != "kvstore"] + [self.store.member]
        self.tell_members()

    def tell_members(self) -> None:
        for process in self.processes.values():
            if process.alive:
                self.perform(process, process.core.on_members(self.members, self.now_ms, self.now_ms))

    def kill(self, name: str) -> None:
        """kill -9, seen at once by the kernel's end-of-file on the other side; messages on the way are lost."""
        victim = self.processes[name]
        victim.alive = False
        for answer in self.answers.values():  # the gateway notices by silence
            if not answer.done:
                answer.failed = Failed(request=RequestId(""), code="peer_failed", phase="?", text="", retryable=True)
        self.bury(victim.peer)
        for request in self.answers:
            self.cancel(request)
        if self.store is not None:
            self.store.core.on_peer_dead(victim.peer)

    def join(self, guest: PeerId, host: PeerId) -> None:
        """The guest maps the host's memory."""
        if self.store is not None and host == self.store.peer:
            self.store.core.on_peer_joined(guest, self.now_ms)
        for process in self.processes.values():
            if process.alive and process.peer == host:
                self.perform(process, process.core.on_peer_joined(guest))

    def kill_store(self) -> None:
        """The same for the KV store. Its memory stays as long as somebody maps it, but nobody will."""
        assert self.store is not None
        peer, self.store = self.store.peer, None
        self.bury(peer)

    def bury(self, peer: PeerId) -> None:
        for link in [link for link in self.links if peer in link]:
            del self.links[link]
        for process in self.processes.values():
            if process.alive:
                for move in process.moves:
                    move.broken = move.broken or move.order.peer == peer
                self.perform(process, process.core.on_peer_dead(peer, self.now_ms))

    # -- the gateway

    def send(
        self,
        name: str,
        prompt: list[int],
        max_tokens: int,
        *,
        timeout_ms: int = 10**6,
        stop_token_ids: tuple[int, ...] = (),
        cache_salt: str = "",
        to: str = "prefill",
        **more: object,
    ) -> None:
        """`to`: a decode or mixed worker answers by itself. `more`: fields of Generate."""
        sampling = Sampling(max_tokens=max_tokens, stop_token_ids=stop_token_ids)
        message = self.generate(name, prompt, sampling, timeout_ms=timeout_ms)
        decode = message.decode if to.startswith("prefill") else None
        message = msgspec.structs.replace(message, cache_salt=cache_salt, decode=decode, **more)
        self.answers[message.request].tokens += message.emitted
        self.post(GATEWAY, self.processes[to].peer, message)

    def generate(
        self, name: str, prompt: list[int], sampling: Sampling, *, decode: str = "decode-0", timeout_ms: int = 10**6
    ) -> Generate:
        request = RequestId(name)
        self.answers[request] = Answer(prompt, sampling.max_tokens)
        return Generate(
            request=request, prompt=tuple(prompt), sampling=sampling, timeout_ms=timeout_ms, decode=WorkerId(decode)
        )

    def resize(self, name: str, n_pages: int, *, call: int = 0) -> None:
        """An operator's word; answers are in `resized`."""
        message = Resize(call=call, device_memory_bytes=n_pages * self.layout.page_bytes)
        self.post(GATEWAY, self.processes[name].peer, message)

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
            case ResizeAnswer():
                self.resized.append(message)
            case Failed(request=request):
                if not self.answers[request].done:
                    self.answers[request].failed = message

    # -- the shells

    def post(self, source: PeerId, target: PeerId, message: object, payloads: list[list[Page]] | None = None) -> None:
        self.links.setdefault((source, target), deque()).append((message, payloads or []))

    def unheard(self, peer: PeerId) -> list[object]:
        """Messages to somebody who is not there."""
        return [message for target, message in self.lost if target == peer]

    def process(self, peer: PeerId) -> Process | None:
        return next((p for p in self.processes.values() if p.peer == peer and p.alive), None)

    def perform(self, process: Process, actions: list[Action], payloads: list[list[Page]] | None = None) -> None:
        for action in actions:
            self.do(process, action, payloads or [])
        for following in (process.core.plan, process.core.plan_ahead) if self.ahead else (process.core.plan,):
            plan = following()
            loads = process.core.loads(self.now_ms)
            for action in loads:
                self.do(process, action, [])
            if plan is not None:
                self.require_fits(process, plan)
                process.steps.append(plan)

    def require_fits(self, process: Process, plan: StepPlan) -> None:
        """What the buffers of an engine are sized by."""
        assert len(plan.segments) <= process.max_running
        assert process.core._scheduler.n_running <= process.max_running
        assert all(one.start + one.count <= process.context_tokens for one in plan.segments)
        self.require_scratch(process, plan)

    def require_scratch(self, process: Process, plan: StepPlan) -> None:
        """The arena holds what the step needs: when it is submitted, and as long as it is computed."""
        if self.arena is not None:
            needed = self.arena.step.needs_bytes(plan.n_tokens, max(one.start + one.count for one in plan.segments))
            assert needed <= len(process.arena) * self.arena.chunk_bytes, f"{plan} without scratch"

    def do(self, process: Process, action: Action, payloads: list[list[Page]]) -> None:
        match action:
            case Send(to, message):
                kept = (
                    process.payloads.pop((message.transfer, message.spans[0]), None)
                    if isinstance(message, KvSent)
                    else None
                )
                self.post(process.peer, to, message, [kept] if kept is not None else [])
            case Copy():
                process.copies.append(action)
            case OpenChannel(peer=peer):
                if self.transport == "shm":
                    self.join(process.peer, peer)
                report = TransportReport(peer=peer, kind=self.transport, gib_per_s=1.0)
                self.perform(process, process.core.on_channel(report, self.now_ms))
            case BeginRing(ring, free_layer):
                assert ring not in process.rings
                process.rings[ring] = free_layer
            case OpenRing(ring, free_layer) if ring in process.rings:
                if free_layer is None:
                    del process.rings[ring]
                else:
                    process.rings[ring] = max(process.rings[ring], free_layer)
            case FetchBlocks() | StoreBlocks():
                process.moves.append(Move(action))
            case FillBlocks(own_pages):
                for pages, payload in zip(own_pages.tolist(), payloads, strict=False):
                    process.memory.write_all(pages, payload)
            case Fill(pages=pages, payload=index):
                process.memory.write_all(pages, payloads[index])
            case SendBlocks(to, message, pages):
                self.post(process.peer, to, message, [process.memory.read_all(row) for row in pages.tolist()])
            case ResizeMemory(n_pages=n_pages):
                process.resizes.append(n_pages)
            case Dial() | HangUp():
                pass

    def move_chunks(self, process: Process, order: LendChunks | TakeBackChunks) -> str:
        """Real mappings may fail, but for those that a worker starts with."""
        comes_later = isinstance(order, TakeBackChunks) and order.owner != ACTIVATIONS
        if process.alive and process.arena and not comes_later and self.rng.random() < self.flaky_maps:
            self.moved_chunks["refused"] += len(order.chunks)
            return "no mapping left"
        if isinstance(order, LendChunks):
            self.lend(process, order.chunks, order.to)
        else:
            self.take_back(process, order.chunks, order.owner)
        return ""

    def lend(self, process: Process, chunks: tuple[int, ...], to: Owner) -> None:
        self.moved_chunks["lent"] += len(chunks)
        for chunk in chunks:
            process.memory.lend(pages_of_chunk(chunk))
        if to == ACTIVATIONS:
            process.arena += chunks

    def take_back(self, process: Process, chunks: tuple[int, ...], owner: Owner) -> None:
        if owner != ACTIVATIONS:
            process.refills.append(chunks)
            return
        assert process.arena[-len(chunks) :] == list(chunks), "the arena shrinks at its end"
        self.home(process, chunks)
        del process.arena[-len(chunks) :]
        if process.step is not None:
            self.require_scratch(process, process.step)

    def home(self, process: Process, chunks: tuple[int, ...]) -> None:
        self.moved_chunks["returned"] += len(chunks)
        for chunk in chunks:
            process.memory.take_back(pages_of_chunk(chunk))

    def refill(self, process: Process) -> None:
        """The system gives chunks back, or has no memory now."""
        chunks, problem = process.refills.popleft(), "none left" if self.rng.random() < self.flaky else ""
        if problem:
            self.moved_chunks["refused"] += len(chunks)
        else:
            self.home(process, chunks)
        self.perform(process, process.core.on_chunks_back(chunks, problem, self.now_ms))

    def choices(self) -> list[tuple[str, Happens]]:
        """Events that can happen now."""
        choices: list[tuple[str, Happens]] = [("link", link) for link in self.ready_links()]
        for process in self.processes.values():
            if not process.alive:
                continue
            if process.step is not None and not self.waits_for_load(process):
                choices.append(("step", process))
            waiting: dict[str, Sized] = {
                "result": process.results,
                "copy": process.copies,
                "move": process.moves,
                "refill": process.refills,
                "resize": process.resizes,
            }
            choices += [(kind, process) for kind, queue in waiting.items() if queue]
        return choices

    def ready_links(self) -> list[tuple[PeerId, PeerId]]:
        return [link for link, queue in self.links.items() if queue]

    def turn(self) -> bool:
        """One random event; False if nothing can happen but the passing of time."""
        choices = self.choices()
        if not choices:
            return False
        self.now_ms += self.rng.choice([0.0, 0.1, 1.0])
        kind, what = self.rng.choice(choices)
        self.happen(kind, what)
        return True

    def happen(self, kind: str, what: Happens) -> None:
        if isinstance(what, tuple):
            self.carry(what)
        elif kind == "step":
            self.compute(what)
        elif kind == "result":
            self.perform(what, what.core.on_step(what.results.popleft(), self.now_ms))
        elif kind == "move":
            self.move(what)
        elif kind == "refill":
            self.refill(what)
        elif kind == "resize":
            self.change_memory(what)
        else:
            self.copy(what)

    def change_memory(self, process: Process) -> None:
        """The shell: memory comes, unless the machine has no more, or goes with what was in it."""
        wanted = -(-process.resizes.popleft() // CHUNK_PAGES) * CHUNK_PAGES
        there = min(wanted, max(self.machine_pages, process.memory.n_pages))
        process.memory.resize(there)
        problem = "" if there == wanted else "the machine has no more"
        self.perform(process, process.core.on_memory(there, problem, self.now_ms))

    def waits_for_load(self, process: Process) -> bool:
        """The gate: a layer is computed when it has been fetched, or never will be; and when its pages may be written."""
        if self.is_ring_closed(process):
            return True
        loads = process.step.loads if process.step is not None else ()
        moves = [move for move in process.moves if move.order.call in loads]
        return any(move.first_missing <= process.layer for move in moves)

    def is_ring_closed(self, process: Process) -> bool:
        return any(
            process.rings.get(ring, self.layout.layers) < process.layer < self.layout.layers
            for ring in (process.step.rings if process.step is not None else ())
        )

    def compute(self, process: Process) -> None:
        """The engine: one layer, or the end of a step."""
        step, layer = process.steps[0], process.layer
        if layer < self.layout.layers:
            self.engine.layer(step, layer, process.memory, process.wrong)
            process.layer += 1
            if any(segment.streamed for segment in step.segments):
                process.untold += 1
                last = layer == self.layout.layers - 1 or self.is_ring_closed(process)
                if last or self.rng.random() < 0.7:  # a loop that is late hears of several at once
                    first, process.untold = layer + 1 - process.untold, 0
                    self.perform(process, process.core.on_layer(first, self.now_ms, layer + 1 - first))
            return
        result = self.engine.finish(process.steps.popleft(), process.memory, process.wrong)
        process.layer, process.wrong = 0, set()
        if self.ahead:
            process.results.append(result)
        else:
            self.perform(process, process.core.on_step(result, self.now_ms))

    def copy(self, process: Process) -> None:
        """The copier: one span."""
        copy = process.copies.popleft()
        order, contents = copy.order, process.memory.read_all(copy.source_pages)
        target = self.process(order.to)
        ok = target is not None
        if self.transport == "tcp":
            process.payloads[order.transfer, order.span] = contents
        elif target is not None:
            target.memory.write_all(order.target_pages, contents)
        moved = Moved(ok, 1.0, 1, len(contents) * self.layout.page_bytes)
        self.perform(process, process.core.on_copied(order.transfer, order.span, moved, self.now_ms))

    def require_permission(self, process: Process, order: FetchBlocks | StoreBlocks) -> None:
        """A layer, or all, of an order is about to be moved. Here nothing ends a permission too early."""

    def memory_of(self, peer: PeerId) -> Memory | None:
        if self.store is not None and self.store.peer == peer:
            return self.store.memory
        found = self.process(peer)
        return None if found is None else found.memory

    @staticmethod
    def next_move(process: Process) -> Move:
        """The oldest fetch before the oldest store."""
        return next((move for move in process.moves if isinstance(move.order, FetchBlocks)), process.moves[0])

    def move(self, process: Process) -> None:
        """The block mover: one layer of a fetch by layer, else a whole job."""
        move = self.next_move(process)
        peer = move.order.peer
        memory = process.host if peer == HOST_BUFFER else self.memory_of(peer)
        order, by_layer = move.order, isinstance(move.order, FetchBlocks) and move.order.by_layer
        width = order.own_pages.shape[1]
        layers = [move.next_layer] if by_layer else list(range(width))
        ok = memory is not None and not move.broken and self.rng.random() >= self.flaky
        own, theirs = order.own_pages[:, layers].ravel().tolist(), order.peer_pages[:, layers].ravel().tolist()
        if ok and memory is not None:
            self.require_permission(process, order)
            if isinstance(order, StoreBlocks):
                memory.write_all(theirs, process.memory.read_all(own))
            else:
                process.memory.write_all(own, memory.read_all(theirs))
                ok = self.now_ms <= order.deadline_ms
        move.next_layer = layers[-1] + 1
        if by_layer:
            self.perform(process, process.core.on_layer_fetched(order.call, layers[-1], ok=ok, now_ms=self.now_ms))
        if not ok or move.next_layer == width:
            process.moves.remove(move)
            self.free_ring(process, order)
            moved = Moved(ok, 1.0, 1, order.own_pages.size * self.layout.page_bytes)
            self.perform(process, process.core.on_blocks_moved(order.call, moved, self.now_ms))

    @staticmethod
    def free_ring(process: Process, order: FetchBlocks | StoreBlocks) -> None:
        """A copy has ended, well or not: the engine may write its pages again."""
        if isinstance(order, StoreBlocks) and order.ring is not None:
            if order.free_layer is None:
                del process.rings[order.ring]
            else:
                process.rings[order.ring] = order.free_layer

    def carry(self, link: tuple[PeerId, PeerId]) -> None:
        message, payloads = self.links[link].popleft()
        source, target = link
        if target == GATEWAY:
            self.hear(message)
            return
        if self.store is not None and target == self.store.peer:
            for answer, frames in self.store.hear(source, message, payloads, self.now_ms):
                self.post(target, source, answer, frames)
            return
        process = self.process(target)
        if process is None:
            self.lost.append((target, message))
        else:
            self.perform(process, process.core.on_message(source, message, self.now_ms), payloads)

    def pass_time(self, ms: float) -> None:
        """Everybody pings and ticks."""
        self.now_ms += ms
        if self.store is not None:
            self.store.core.on_tick(self.now_ms)
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
