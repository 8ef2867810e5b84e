"""Cores of workers, and of a KV store, in one pure world: scripted time, and events in random order.

What a shell does (carry messages, compute steps, copy pages) happens here as events; processes can die and come back. KV is
modelled as what it was computed from (tests.support.world_memory). What carries messages, and who asks, is a subclass's:
tests.support.world has links that keep order, tests.support.world_faults those that lose, delay and swap.
"""

import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sized
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import msgspec

from common.ids import Incarnation, PeerId, WorkerId
from common.messages.actions import Send
from common.messages.handover import KvSent
from common.messages.liveness import Member
from common.policy.elastic import ArenaTerms
from kvstore.handover.actions import Fill
from services.worker.build_parts import Machine
from services.worker.core.actions import (
    Action,
    BeginRing,
    Copy,
    FetchBlocks,
    FillBlocks,
    OpenChannel,
    OpenRing,
    ResizeMemory,
    SendBlocks,
    StoreBlocks,
)
from services.worker.core.plan import StepPlan
from services.worker.core.resizing import PoolSize
from services.worker.settings import WorkerSettings
from tests.support.world_chunks import Chunks
from tests.support.world_copies import Copies
from tests.support.world_memory import MemoryEngine, Page
from tests.support.world_process import CHUNK_PAGES, LAYOUT, MODEL, SETTINGS, Move, Process, new_process
from tests.support.world_store import Store

Link = tuple[PeerId, PeerId]
"""From whom, to whom."""
Happens = Link | Process
"""To whom: a link that carries a message, or a process."""


class Cluster(ABC):
    """Owns the time, the processes, and what may happen next. `transport` is shm (the copy writes the peer's pages) or tcp
    (the receiver does)."""

    copies: Copies

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
        self.rng, self.transport, self.flaky, self.settings = rng, transport, flaky, settings
        self.chunks, self.arena = Chunks(rng, arena, flaky_maps), arena
        self.layout = replace(LAYOUT, layers=layers)
        self.ahead, self.context_tokens, self.now_ms = ahead, context_tokens, 0.0
        self.links: dict[Link, deque[Any]] = {}
        """What can be heard next on each; what it is wrapped in is the subclass's."""
        self.lives = 0
        self.engine = MemoryEngine(layers=layers, block_tokens=LAYOUT.block_tokens)
        self.store_blocks = store_blocks
        self.store: Store | None = None
        self.machine_pages, self.host_pages = 10**6, host_pages
        self.pages = {"prefill": prefill_pages, "decode": decode_pages}
        self.processes: dict[str, Process] = {}
        self.members: list[Member] = []
        self._names = ("decode", "prefill", *more)

    # -- lives

    def start_all(self) -> None:
        """The store, and every worker; to be called once, when the subclass is ready."""
        if self.store_blocks:
            self.start_store()
        for name in self._names:
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
            **(SETTINGS | self.settings),  # type: ignore[arg-type]  # a test's keywords
        )
        pages = self.pages["prefill" if role == "prefill" else "decode"]
        size = PoolSize(pages, CHUNK_PAGES, self.layout.page_bytes, self.host_pages)
        process = new_process(mine, settings, Machine(size=size, layout=self.layout, arena=self.arena))
        self.processes[name] = process
        process.core.move_chunks_with(lambda order: self.chunks.move(process, order))
        self.members = [m for m in self.members if m.id != mine.id] + [mine]
        self.tell_members()

    def start_store(self) -> None:
        """A KV store's new life."""
        self.lives += 1
        self.store = Store(self.lives, self.layout, self.store_blocks)
        self.members = [m for m in self.members if m.role != "kvstore"] + [self.store.member]
        self.tell_members()

    def process(self, peer: PeerId) -> Process | None:
        return next((p for p in self.processes.values() if p.peer == peer and p.alive), None)

    # -- what a subclass knows

    @abstractmethod
    def tell_members(self) -> None:
        """Who can read who is there does."""

    @abstractmethod
    def post(self, source: PeerId, target: PeerId, message: object, payloads: list[list[Page]] | None = None) -> None:
        """Put a message on its way."""

    @abstractmethod
    def carry(self, link: Link) -> None:
        """The next message of a link arrives."""

    @abstractmethod
    def open_channel(self, process: Process, peer: PeerId) -> None:
        """A worker gets ready to copy to a peer."""

    # -- what cores want done

    def perform(self, process: Process, actions: list[Action], payloads: list[list[Page]] | None = None) -> None:
        for action in actions:
            self.do(process, action, payloads or [])
        for following in (process.core.plan, process.core.plan_ahead) if self.ahead else (process.core.plan,):
            plan = following()
            loads = process.core.loads(self.now_ms)
            for action in loads:
                self.do(process, action, [])
            if plan is not None:
                self._require_fits(process, plan)
                process.steps.append(plan)

    def _require_fits(self, process: Process, plan: StepPlan) -> None:
        """What the buffers of an engine are sized by."""
        assert len(plan.segments) <= process.max_running
        assert process.core._scheduler.n_running <= process.max_running
        assert all(one.start + one.count <= process.context_tokens for one in plan.segments)
        self.chunks.require_scratch(process, plan)

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
                self.open_channel(process, peer)
            case BeginRing(ring, free_layer):
                process.begin_ring(ring, free_layer)
            case OpenRing(ring, free_layer):
                process.open_ring(ring, free_layer)
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

    # -- events

    def choices(self) -> list[tuple[str, Happens]]:
        """Events that can happen now."""
        choices: list[tuple[str, Happens]] = [("link", link) for link in self.ready_links()]
        for process in self.processes.values():
            if not process.alive:
                continue
            if process.step is not None and not process.waits_for_load:
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

    def ready_links(self) -> list[Link]:
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
            self.copies.move(what)
        elif kind == "refill":
            problem = "none left" if self.rng.random() < self.flaky else ""
            chunks = self.chunks.refill(what, problem)
            self.perform(what, what.core.on_chunks_back(chunks, problem, self.now_ms))
        elif kind == "resize":
            self._change_memory(what)
        else:
            self.copies.copy(what)

    def _change_memory(self, process: Process) -> None:
        """The shell: memory comes, unless the machine has no more, or goes with what was in it."""
        wanted = -(-process.resizes.popleft() // CHUNK_PAGES) * CHUNK_PAGES
        there = min(wanted, max(self.machine_pages, process.memory.n_pages))
        process.memory.resize(there)
        problem = "" if there == wanted else "the machine has no more"
        self.perform(process, process.core.on_memory(there, problem, self.now_ms))

    def compute(self, process: Process) -> None:
        """The engine: one layer, or the end of a step."""
        step, layer = process.steps[0], process.layer
        if layer < self.layout.layers:
            self.engine.layer(step, layer, process.memory, process.wrong)
            process.layer += 1
            if any(segment.streamed for segment in step.segments):
                process.untold += 1
                last = layer == self.layout.layers - 1 or process.is_ring_closed
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
