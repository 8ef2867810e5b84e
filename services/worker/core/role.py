"""What prefill and decode cores have in common: the events a shell brings, and the parts every worker is made of."""

from abc import ABC, abstractmethod

from common.block_hash import BlockHash, root_hash
from common.ids import PeerId, RequestId, TransferId
from common.messages import AnyMessage
from common.messages.actions import Send
from common.messages.base import Message
from common.messages.cache_events import CacheEvent
from common.messages.handover import Grant, KvSpan
from common.messages.liveness import Drain, Hello, Member, Ping, Refused, Report, TransportReport, Welcome, newer_life
from common.messages.requests import AskAbout, Cancel, Failed, Generate
from common.messages.resizing import Resize
from common.policy.succession import Succession
from kvstore.index.block_pool import BlockPool
from services.worker.core.actions import Action, CarryOut, Moved
from services.worker.core.found import Started
from services.worker.core.overseer import Overseer
from services.worker.core.parts import Parts
from services.worker.core.plan import StepPlan, StepResult
from services.worker.core.reporting import Reporter
from services.worker.core.step_times import StepTimes
from services.worker.core.wire import answers_about, refusal_of, requests_of

_ORDERS = (Generate, Cancel, AskAbout, Drain, Resize)  # a gateway's alone
DRAINED = "the worker was told to stop, and its time to drain is over"


class WorkerRole(ABC):
    """Messages, results and time in, actions out. An event that means nothing to a role changes nothing."""

    def __init__(self, mine: Member, parts: Parts, *, max_queued: int) -> None:
        self._mine, self._max_queued = mine, max_queued
        self._pool, self._scheduler, self._callers = parts.pool, parts.scheduler, parts.callers
        self._neighbours, self._cache, self._costing = parts.neighbours, parts.cache, parts.costing
        self._resizing, self._memory = parts.resizing, parts.pool_memory
        self.overseer = Overseer(parts)
        self._reporter = Reporter(mine, parts, self.overseer)
        self._ending, self.succession = False, Succession()
        self._times = StepTimes()
        self._owed: dict[PeerId, list[Failed]] = {}  # until their gateway pings, or falls silent

    def on_message(self, peer: PeerId, message: AnyMessage, now_ms: float) -> list[Action]:
        """Handle one message. Raises ProtocolViolation for one that has no business here."""
        calls = isinstance(message, Hello | Ping)
        if not self._neighbours.heard(peer, now_ms) or calls:  # workers that read each other's pages dial both ways
            self._callers.heard(peer, now_ms)
        if isinstance(message, _ORDERS):
            self._callers.require_gateway(peer, message)
        match message:
            case Welcome() | Refused() | Report():
                return self._neighbours.on_message(peer, message, now_ms)
            case Ping() | Hello():
                return self._answer(peer, message, now_ms)
            case Drain(on=on):  # an operator's word; it does not call the end of the process off
                self._reporter.draining = on or self._ending
                return []
            case Resize():
                return self._on_resize(peer, message, now_ms)
            case AskAbout(requests=requests):
                return [Send(peer, answer) for answer in answers_about(requests, self._has)]
        if self._cache.concerns(message):
            return self._cache.on_message(peer, message, self._wanted_pages(), now_ms) + self._after_cache(now_ms)
        return self._on_request(peer, message, now_ms)

    @abstractmethod
    def _on_request(self, peer: PeerId, message: AnyMessage, now_ms: float) -> list[Action]:
        """A message of this role's own work. Raises ProtocolViolation for any other."""

    @abstractmethod
    def _has(self, request: RequestId) -> bool:
        """Whether the request is here, and its gateway will hear of it."""

    @abstractmethod
    def _after_cache(self, now_ms: float) -> list[Action]:
        """Something was found, loaded or freed: requests may go on."""

    @abstractmethod
    def on_step(self, result: StepResult, now_ms: float) -> list[Action]:
        """The engine finished a step."""

    def on_peer_dead(self, peer: PeerId, now_ms: float) -> list[Action]:
        """The kernel says that a peer maps our memory no more: nothing of it reads or writes here."""
        self._cache.on_reader_gone(peer)
        return self.on_peer_lost(peer, now_ms)

    @abstractmethod
    def on_peer_lost(self, peer: PeerId, now_ms: float) -> list[Action]:
        """A peer is silent, its memory is gone, or a newer life has its name. It may go on and use what we gave it."""

    @abstractmethod
    def on_tick(self, now_ms: float) -> list[Action]:
        """Time passed: deadlines, leases, pings, silence."""

    @abstractmethod
    def report(self, sequence: int, now_ms: float) -> Report:
        """State for whoever pinged."""

    @property
    def pool(self) -> BlockPool:
        """To read: who holds which pages."""
        return self._pool

    @property
    @abstractmethod
    def idle(self) -> bool:
        """No request is here in any phase."""

    def check(self) -> None:
        """Conservation laws. Raises RuntimeError with the numbers."""
        for part in (self._cache, self._resizing, self._memory.scratch):
            part.check()

    @abstractmethod
    def abandon(self) -> list[Action]:
        """The drain time is over: tell every gateway that still waits."""

    def _end_unheard(self, request: RequestId) -> None:
        """Its gateway did not get what was sent: there is no use in going on."""

    def on_unsent(self, peer: PeerId, message: Message, now_ms: float) -> None:
        """A message could not be sent. Requests whose tokens are lost fail, as soon as their gateway is heard again."""
        for request in requests_of(message):
            self._end_unheard(request)
            text = f"{self._mine.id} could not reach the gateway for a while"
            failed = Failed(request=request, code="peer_failed", phase="decode", text=text, retryable=True)
            self._owed.setdefault(peer, []).append(failed)

    def on_layer(self, layer: int, now_ms: float, n_layers: int = 1) -> list[Action]:
        """The engine wrote K and V of `n_layers` layers, from `layer` on, of the step it computes."""
        return self._scheduler.offload.on_layer(layer, n_layers)

    def on_copied(self, transfer: TransferId, span: KvSpan, moved: Moved, now_ms: float) -> list[Action]:
        """A copy ended, well or not."""
        return []

    def on_layer_fetched(self, call: int, layer: int, *, ok: bool, now_ms: float) -> list[Action]:
        """One layer of a FetchBlocks is in our pages, or will never be."""
        if not ok:
            self._cache.on_layer_failed(call)
        return []

    def on_blocks_moved(self, call: int, moved: Moved, now_ms: float) -> list[Action]:
        """A FetchBlocks or StoreBlocks has ended."""
        return self._cache.on_moved(call, moved, now_ms) + self._after_cache(now_ms)

    def on_channel(self, report: TransportReport, now_ms: float) -> list[Action]:
        """A way to move KV to a peer was found."""
        self._neighbours.on_channel(report)
        return self._after_cache(now_ms)

    def on_channel_failed(self, peer: PeerId, text: str) -> list[Action]:
        """No allowed way to a peer works."""
        self._neighbours.on_channel_failed(peer, text)
        return []

    def on_peer_joined(self, peer: PeerId) -> list[Action]:
        """A peer maps our memory from now on: it is alive."""
        return []

    def on_members(self, members: list[Member], now_ms: float, read_ms: float) -> list[Action]:
        """The membership as Redis had it at `read_ms`, of which the loop hears at `now_ms`."""
        if self.succession.on_newer(newer_life(self._mine, members), read_ms):
            self.drain()
        actions, replaced = self._neighbours.on_members(members, now_ms)
        return actions + [action for peer in replaced for action in self.on_peer_lost(peer, now_ms)]

    def wants_payloads(self, transfer: TransferId) -> bool:
        """Whether KvSent of this transfer must bring the bytes along."""
        return False

    def grant_of(self, transfer: TransferId, sender: PeerId) -> Grant | None:
        """What this sender may fill for a transfer, if it still may."""
        return None

    def on_corrupt(self, transfer: TransferId, text: str, now_ms: float) -> list[Action]:
        """What came of a transfer is not what was sent."""
        return []

    def plan(self) -> StepPlan | None:
        """The next step to compute, if the engine is free and there is work."""
        return self._scheduler.plan()

    def plan_ahead(self) -> StepPlan | None:
        """The step that follows the one being computed, if it can be known already."""
        return self._scheduler.plan_ahead()

    def move_chunks_with(self, carry_out: CarryOut) -> None:
        """Chunks of page memory move by this. Before anything else; raises ConfigError if what lasts cannot be had."""
        self._memory.carry_out_with(carry_out)

    def on_chunks_back(self, chunks: tuple[int, ...], problem: str, now_ms: float) -> list[Action]:
        """A TakeBackChunks from the system has ended. `problem`: why they have no memory; empty: they have."""
        self._memory.on_chunks_back(chunks, problem)
        return self._resizing.on_chunks_back(problem) + self._end_unfit(now_ms) + self._after_cache(now_ms)

    def loads(self, now_ms: float) -> list[Action]:
        """What sequences that have started wait for: to be carried out before the step of the last plan begins."""
        self._times.note(self._scheduler.step, now_ms)
        leaving = self._scheduler.parking.take_orders()
        started = self._scheduler.take_started()
        return leaving + [action for one in started for action in self._on_started(one, now_ms)]

    def _on_started(self, started: Started, now_ms: float) -> list[Action]:
        """A sequence has its pages."""
        return [] if started.load is None else self._cache.start(started.load, now_ms)

    def _wanted_pages(self) -> int:
        """Pages that waiting prompts need."""
        return self._scheduler.wanted_pages

    def note(self, counters: dict[str, float], gauges: dict[str, float]) -> None:
        """Counters and gauges of the shell as they are now: the next report tells them."""
        self._reporter.noted, self._reporter.noted_gauges = counters, gauges

    def take_events(self) -> list[CacheEvent]:
        """What happened to cached blocks since the last call."""
        return self._cache.events.take()

    def drain(self) -> None:
        """The process ends: finish what is here, take nothing new; reports say so from now on."""
        self._ending = self._reporter.draining = True

    def _on_resize(self, peer: PeerId, message: Resize, now_ms: float) -> list[Action]:
        """An operator's word: grow or shrink."""
        actions = self._resizing.ask(peer, message)
        return actions + self._end_unfit(now_ms) + self._after_cache(now_ms)

    def on_memory(self, n_pages: int, problem: str, now_ms: float) -> list[Action]:
        """A ResizeMemory has ended. `problem`: why there is not memory for as many pages as it named; empty: there is."""
        return self._resizing.on_memory(n_pages, problem) + self._after_cache(now_ms)

    def _end_unfit(self, now_ms: float) -> list[Action]:
        """After the pool has shrunk: who waits and will never fit is told what it would be told at its arrival."""
        return self._end_too_large(now_ms) if self._resizing.has_shrunk else []

    @abstractmethod
    def _end_too_large(self, now_ms: float) -> list[Action]:
        """End requests that have no pages and need more than the pool has."""

    @property
    def has_callers(self) -> bool:
        """Whether somebody is there who may still believe that this worker takes requests."""
        return self._callers.n_callers > 0

    def _gone_silent(self, now_ms: float) -> list[PeerId]:
        gone = self._callers.gone_silent(now_ms)
        for peer in [peer for peer in self._owed if not self._callers.knows(peer)]:
            del self._owed[peer]
        return gone

    def _root(self, salt: str) -> BlockHash:
        """What the names of a request's blocks start from."""
        assert self._mine.model is not None, "a worker serves a model"
        return root_hash(self._mine.model, salt)

    def _refusal(self, message: Generate) -> str:
        """Why a request can never be served here; empty if it can."""
        assert self._mine.model is not None, "a worker serves a model"
        if refusal := refusal_of(message, self._mine.model.vocab_tokens, self._mine.takes_tokens):
            return refusal
        if message.request in self._scheduler.sequences:
            return f"request {message.request} is still being ended on {self._mine.id}; ids must not be used twice"
        return ""

    def _tick_neighbours(self, now_ms: float) -> list[Action]:
        actions, silent = self._neighbours.on_tick(now_ms)
        for peer in silent:
            actions += self.on_peer_lost(peer, now_ms)
        self._memory.on_tick(now_ms, may_lend=self._resizing.settled and not self._wanted_pages())
        return actions + self._resizing.on_tick() + self._end_unfit(now_ms) + self._cache.on_tick(now_ms)

    def _answer(self, peer: PeerId, message: Ping | Hello, now_ms: float) -> list[Action]:
        if isinstance(message, Ping):
            owed = [Send(peer, failed) for failed in self._owed.pop(peer, ())]
            return [Send(peer, self.report(message.sequence, now_ms)), *owed]
        return [self._callers.greet(peer, message)]
