"""The loop of a worker: hear, decide, act, compute. One thread owns all state; it makes no serving decision itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from common.clock import Clock
from common.errors import ProtocolViolation
from common.ids import PeerId
from common.log import Log
from common.messages import AnyMessage
from common.messages.actions import Dial, HangUp, Send
from common.messages.base import Message
from common.messages.blocks import Found
from common.messages.handover import KvSent, Probe, Probed
from common.messages.liveness import Ping
from common.net.cache_events import CacheEventPublisher
from common.net.sockets import Exchange, Payload
from common.net.violations import Violations
from kvstore.handover.actions import Fill
from kvstore.transport.block_jobs import BlockEvent, FetchJob, LayerFetched
from kvstore.transport.check_found import check_found
from kvstore.transport.probe import answer_probe
from kvstore.transport.tcp import check_payloads
from services.worker.checksum_thread import ChecksumsMade, ChecksumThread
from services.worker.chunk_lender import ChunkLender
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
from services.worker.core.role import WorkerRole
from services.worker.engine_thread import EngineThread
from services.worker.feed import EngineFeed
from services.worker.inbox import (
    BlocksMoved,
    ChannelFailed,
    ChannelOpened,
    ChannelTried,
    ChunksBack,
    CopyEnded,
    EngineDied,
    Event,
    Events,
    HostGone,
    LayerDone,
    MembersRead,
    MemoryChanged,
    PeerGone,
    PeerJoined,
    ShareDied,
    StepDone,
    joined,
)
from services.worker.kv_verifier import Accuse, Corrupt, Hear, KvVerifier, Tell
from services.worker.links import Links
from services.worker.page_resizer import PageResizer

_TICK_MS = 50.0
_CHECK_MS = 5_000.0
_NOTICE_MS = 1_200.0  # two pings: time for gateways to see in a report that this worker drains


@dataclass(frozen=True, slots=True)
class Ports:
    """Where a worker meets the world."""

    exchange: Exchange
    inbox: Events
    engine: EngineThread
    links: Links
    memory: PageResizer
    events: CacheEventPublisher
    """Passes cache events on to whoever routes, without waiting."""
    lender: ChunkLender
    mapped: Callable[[], dict[str, float]]
    """Counters of what is mapped beside the pages, for reports."""
    check_mapped: Callable[[], None]
    """The laws of what is mapped beside the pages."""
    clock: Clock
    checksums: ChecksumThread | None = None
    """Reads for checksums; None: nothing is verified."""
    gauges: Callable[[], dict[str, float]] = dict
    """Values that only the shell knows, for reports."""


class WorkerService:
    """Runs a core over real sockets, threads and memory."""

    def __init__(self, core: WorkerRole, ports: Ports, log: Log, *, plan_ahead: bool) -> None:
        """`plan_ahead`: plan the engine's next step while it computes."""
        self._core, self._exchange, self._inbox = core, ports.exchange, ports.inbox
        self._links, self._memory, self._events = ports.links, ports.memory, ports.events
        self._lender, self._mapped, self._check_mapped = ports.lender, ports.mapped, ports.check_mapped
        self._checksums = ports.checksums
        self._verifier = None if ports.checksums is None else _verifier(core, ports, ports.checksums, log)
        self._feed = EngineFeed(core, ports.engine, ahead=plan_ahead)
        self._log, self._violations = log, Violations("protocol_violation", log)
        self._unsent = Violations("send_refused", log)
        self._refused_moves = Violations("chunks_not_moved", log)
        self._checked_ms, self._unchecked = 0.0, False
        self._drain_from_ms: float | None = None
        self._clock, self._gauges = ports.clock, ports.gauges
        core.move_chunks_with(self._move_chunks)

    def serve(self, stopping: Callable[[], bool], dump_asked: Callable[[], bool], *, drain_ms: float) -> None:
        """Run until `stopping()`, then until no request is left or `drain_ms` have passed.

        The state is written to the log whenever `dump_asked()`. Raises what the engine raised: a worker whose engine died is of no use.
        """
        ticked_ms = 0.0
        while True:
            now_ms = self._clock.now_ms()
            if (stopping() or self._core.succession.over) and self._may_end(now_ms, drain_ms):
                return
            received = self._exchange.receive(0.0 if self._memory.busy else _TICK_MS)
            # First: news of a death must not undo what the same peer asked after it.
            for event in joined(self._inbox.take()):
                self._act(self._decide(event), ())
            for peer, message, payloads in received:
                self._hear(peer, message, payloads)
            now_ms = self._clock.now_ms()
            if now_ms - ticked_ms >= _TICK_MS:
                ticked_ms = now_ms
                self._links.on_tick(now_ms)
                if self._verifier is not None:
                    self._verifier.on_tick()
                self._act(self._core.on_tick(now_ms), ())
                self._oversee(now_ms, dump_asked=dump_asked())
                self._check_when_idle(now_ms)
            self._unchecked |= self._feed.feed(self._before_step)
            self._memory.turn()  # while the engine has something to do

    @property
    def succeeded(self) -> bool:
        """Whether a newer life has taken this worker's name."""
        return self._core.succession.over

    def _oversee(self, now_ms: float, *, dump_asked: bool) -> None:
        overseer = self._core.overseer
        if dump_asked:
            self._log.event("state", **overseer.state(now_ms))
        if (fired := overseer.on_tick(now_ms)) is not None:
            self._log.event("stuck", text=fired.text, ends=fired.end, **overseer.state(now_ms))
            self._act(overseer.carry_out(fired, now_ms), ())

    def _before_step(self) -> None:
        """The engine waits only for loads that have begun."""
        self._act(self._core.loads(self._clock.now_ms()), ())
        self._events.publish(self._core.take_events())

    def _may_end(self, now_ms: float, drain_ms: float) -> bool:
        """From the first call on, the worker drains. Callers get a moment to see it, and requests time to finish."""
        if self._drain_from_ms is None:
            self._core.drain()
            self._drain_from_ms = now_ms
            _tell_succession(self._core.succession.successor, self._log)
        elapsed_ms = now_ms - self._drain_from_ms
        if elapsed_ms < min(_NOTICE_MS, drain_ms) and self._core.has_callers:
            return False
        if self._core.idle:
            self._core.check()
            return True
        if elapsed_ms >= drain_ms:
            self._act(self._core.abandon(), ())
        return elapsed_ms >= drain_ms

    def _hear(self, peer: PeerId, message: AnyMessage, payloads: Sequence[Payload]) -> None:
        try:
            if isinstance(message, Probe):
                self._exchange.send(peer, answer_probe(message, payloads))
                return
            if isinstance(message, Probed):
                self._links.on_probed(peer, message, self._clock.now_ms())
                return
            if isinstance(message, KvSent) and self._core.wants_payloads(message.transfer):
                check_payloads(message, payloads, self._links.page_bytes)
            if isinstance(message, Found):
                check_found(message, payloads, self._links.layout.layers, self._links.block_bytes)
            if self._verifier is not None and self._verifier.holds(peer, message, payloads):
                return
            self._hear_right(peer, message, payloads)
        except ProtocolViolation as error:  # the peer's fault: say so, keep serving the others
            self._violations.note(peer, str(error))

    def _counters(self) -> dict[str, float]:
        verified = {} if self._verifier is None else self._verifier.counters()
        told = {"protocol_violations_total": self._violations, "send_refused_total": self._unsent}
        wrong = {series: float(kind.total) for series, kind in told.items()}
        return {**self._events.counters(), **self._mapped(), **self._exchange.counters(), **wrong, **verified}

    def _held(self) -> dict[str, float]:
        return {} if self._verifier is None else self._verifier.gauges()

    def _hear_right(self, peer: PeerId, message: AnyMessage, payloads: Sequence[Payload]) -> None:
        """The core hears of it. Raises ProtocolViolation."""
        if self._verifier is not None:
            self._links.note_heard(peer, message)
        if isinstance(message, Ping):  # the report tells what is so now
            self._core.note(self._counters(), self._gauges() | self._held())
        self._act(self._core.on_message(peer, message, self._clock.now_ms()), payloads)

    def _decide(self, event: Event) -> list[Action]:
        now_ms = self._clock.now_ms()
        match event:
            case LayerDone(layer=layer, n_layers=n_layers):
                return self._core.on_layer(layer, now_ms, n_layers)
            case StepDone(result=result):
                self._feed.ended()
                return self._core.on_step(result, now_ms)
            case CopyEnded(done=done):
                if not done.ok:
                    self._log.event("copy_failed", transfer=done.job.transfer, peer=done.job.to, text=done.error_text)
                self._links.keep_payload(done)
                moved = Moved(done.ok, done.elapsed_ms, done.n_copies, done.n_bytes)
                self._act(self._core.on_copied(done.job.transfer, done.job.span, moved, now_ms), ())
                self._links.forget_payload(done)
                return []
            case BlocksMoved(event=blocks):
                return self._on_blocks(blocks, now_ms)
            case ChecksumsMade():
                self._on_checksums(event, now_ms)
                return []
            case MembersRead():
                return self._core.on_members(event.members, now_ms, event.read_ms)
            case PeerGone(peer=peer):
                return self._core.on_peer_dead(peer, now_ms)
            case HostGone(peer=peer):
                return self._core.on_peer_lost(peer, now_ms)
            case PeerJoined(peer=peer):
                return self._core.on_peer_joined(peer)
            case ChannelTried():
                settled = self._links.on_tried(event)
                return [] if settled is None else self._decide(settled)
            case ChannelOpened(report=report):
                if self._links.measure(report, self._exchange, self._clock):
                    return []
                self._log.event("channel_opened", **msgspec.structs.asdict(report))
                return self._core.on_channel(report, now_ms)
            case ChannelFailed(peer=peer, text=text):
                self._log.event("channel_failed", peer=peer, text=text)
                return self._core.on_channel_failed(peer, text)
            case MemoryChanged(n_pages=n_pages, problem=problem):
                self._log.event("memory_resized", pages=n_pages, problem=problem)
                return self._core.on_memory(n_pages, problem, now_ms)
            case ChunksBack(chunks=chunks, problem=problem):
                if problem:
                    self._log.event("chunks_not_back", chunks=len(chunks), problem=problem)
                return self._core.on_chunks_back(chunks, problem, now_ms)
            case EngineDied(error=error) | ShareDied(error=error):
                raise error

    def _on_blocks(self, event: BlockEvent, now_ms: float) -> list[Action]:
        if isinstance(event, LayerFetched):
            return self._core.on_layer_fetched(event.call, event.layer, ok=event.ok, now_ms=now_ms)
        job = self._links.moved_blocks(event)
        if self._verifier is not None and isinstance(job, FetchJob):
            self._verifier.on_fetched(job, event)
        accusations = self._links.known.accusations(job, event)
        if not event.ok:
            self._log.event("blocks_not_moved", call=event.call, text=event.error_text)
        moved = Moved(event.ok, event.elapsed_ms, event.n_copies, event.n_bytes)
        return self._core.on_blocks_moved(event.call, moved, now_ms) + accusations

    def _on_checksums(self, made: ChecksumsMade, now_ms: float) -> None:
        """What was held back for its checksums goes on."""
        assert self._verifier is not None, "checksums that nobody asked for"
        for verdict in self._verifier.on_made(made):
            match verdict:
                case Hear(peer, message, payloads):
                    try:
                        self._hear_right(peer, message, payloads)
                    except ProtocolViolation as error:
                        self._violations.note(peer, str(error))
                case Tell(to, leaving):
                    self._send(to, leaving, ())
                case Accuse(to, call, blocks):
                    self._tell(to, self._links.known.accusation(to, call, blocks), ())
                case Corrupt(transfer, text):
                    self._act(self._core.on_corrupt(transfer, text, now_ms), ())

    def _send(self, to: PeerId, message: Message, payloads: Sequence[Payload]) -> None:
        if not self._exchange.send(to, message, payloads):
            self._unsent.note(to, type(message).__name__)
            self._core.on_unsent(to, message, self._clock.now_ms())

    def _tell(self, to: PeerId, message: Message, payloads: Sequence[Payload]) -> None:
        """Send it, with checksums if they are wanted: now, or when they are made."""
        if self._verifier is not None:
            message = self._links.with_checksums(to, message)
            if self._verifier.seals(to, message):
                return
        self._send(to, message, payloads)

    def _act(self, actions: Sequence[Action], payloads: Sequence[Payload]) -> None:
        for action in actions:
            match action:
                case Send(to, message):
                    self._tell(to, message, self._links.payloads_for(message))
                case Copy():
                    self._links.copy(action)
                case Fill(pages=pages, payload=index):
                    if payloads:  # without: filled before it was checked
                        self._links.fill(pages, payloads[index])
                case FetchBlocks() | StoreBlocks():
                    self._links.move_blocks(action)
                case BeginRing():
                    self._links.begin_ring(action)
                case OpenRing():
                    self._links.open_ring(action)
                case FillBlocks(own_pages):
                    self._links.fill_blocks(own_pages, payloads, verify=self._verifier is not None)
                case SendBlocks(to, message, pages):
                    frames = self._links.read_blocks(pages)
                    sealed = message if self._verifier is None else self._links.sealed(message, pages)
                    self._send(to, sealed, frames)
                case Dial(peer, endpoint):
                    self._dial(peer, endpoint)
                case OpenChannel(peer, member):
                    self._links.open(peer, member)
                case ResizeMemory(n_pages):
                    self._leave(action)
                    self._memory.order(n_pages)
                case HangUp(peer):
                    self._exchange.hang_up(peer)
                    self._links.close_channel(peer)

    def _move_chunks(self, order: LendChunks | TakeBackChunks) -> str:
        self._leave(order)
        if problem := self._lender.carry_out(order):
            self._refused_moves.note(type(order).__name__, problem)
        return problem

    def _leave(self, order: ResizeMemory | LendChunks | TakeBackChunks) -> None:
        """Pages that nobody holds any more may be read for their checksums still, and lose their memory now."""
        if self._checksums is not None:
            self._checksums.leave(order)

    def _dial(self, peer: PeerId, endpoint: str) -> None:
        try:
            self._exchange.dial(peer, endpoint)
        except ProtocolViolation as error:  # what the membership says of it is no address
            self._log.event("dial_failed", peer=peer, endpoint=endpoint, text=str(error))
            self._core.on_channel_failed(peer, str(error))

    def _check_when_idle(self, now_ms: float) -> None:
        """The laws cost milliseconds on a large pool, so a worker that is idle between requests checks now and then."""
        if self._unchecked and self._core.idle and now_ms - self._checked_ms >= _CHECK_MS:
            self._core.check()
            self._check_mapped()
            self._checked_ms, self._unchecked = now_ms, False


def _tell_succession(successor: PeerId | None, log: Log) -> None:
    if successor is not None:
        text = f"{successor} has taken this worker's name: it finishes what it has and ends"
        log.event("succeeded", by=successor, text=text)


def _verifier(core: WorkerRole, ports: Ports, checksums: ChecksumThread, log: Log) -> KvVerifier:
    return KvVerifier(checksums.post, core, ports.links.fill, ports.links.layout.layers, log, ports.clock)
