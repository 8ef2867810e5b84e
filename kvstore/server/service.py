"""The loop of a KV store: hear, decide, act. One thread owns index and sockets; disk and share threads only pass news on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from common.clock import Clock
from common.errors import ProtocolViolation
from common.ids import PeerId
from common.log import Log
from common.messages import AnyMessage
from common.messages.base import Message
from common.messages.blocks import Found, Publish, Put, Release, Stored
from common.messages.cache_events import CacheEvent
from common.messages.liveness import Ping, newer_life
from common.net.sockets import Exchange, Payload
from common.net.violations import Violations
from common.process_facts import clock_gauges
from kvstore.server.block_memory import BlockMemory
from kvstore.server.core.actions import (
    Action,
    DeleteDisk,
    DiskPaused,
    Pages,
    ReadDisk,
    Reply,
    ScanDisk,
    ShapeMemory,
    Write,
    WriteDisk,
)
from kvstore.server.core.store import KvStoreCore
from kvstore.server.disk_thread import DiskThread
from kvstore.server.inbox import (
    DiskDied,
    DiskRead,
    DiskScanned,
    DiskWritten,
    Event,
    Events,
    GuestGone,
    GuestJoined,
    MembersRead,
    ShareDied,
)
from kvstore.server.page_checks import PageChecks

_TICK_MS = 100.0
_CHECK_AFTER_MS = 5_000.0
_CHECK_MAX_BLOCKS = 4096  # the laws cost 0.1 ms per block: checked only when nobody asks, and not in a large store


@dataclass(frozen=True, slots=True)
class Ports:
    """Where a KV store meets the world."""

    exchange: Exchange
    inbox: Events
    memory: BlockMemory
    publish: Callable[[list[CacheEvent]], None]
    """Passes cache events on to whoever routes, without waiting."""
    clock: Clock
    disk: DiskThread | None = None
    checks: PageChecks | None = None
    """Of every page that comes, lies here and leaves; None: nothing is verified."""


class KvStoreService:
    """Runs a core over real sockets, memory and files; owns none of them, its maker closes all."""

    def __init__(self, core: KvStoreCore, ports: Ports, log: Log) -> None:
        self._core, self._exchange, self._memory = core, ports.exchange, ports.memory
        self._inbox, self._publish, self._clock = ports.inbox, ports.publish, ports.clock
        self._disk, self._checks, self._log = ports.disk, ports.checks, log
        self._violations = Violations("protocol_violation", log)
        self._unsent = Violations("send_refused", log)
        self._active_ms, self._unchecked, self._was_degraded = 0.0, False, False

    def serve(self, stopping: Callable[[], bool], dump_asked: Callable[[], bool]) -> None:
        """Answer messages until `stopping()`, or until a newer life has this store's name and nobody reads here any more.

        The state is written to the log whenever `dump_asked()`. Raises what ended another thread, if that was our own bug.
        """
        self._act(self._core.start(), ())
        ticked_ms = self._clock.now_ms()
        while not (stopping() or self._core.over):
            received = self._exchange.receive(_TICK_MS)
            # First: news of a death must not undo what the same peer asked after it; and who asks has joined before.
            for event in self._inbox.take():
                self._act(self._on_event(event), ())
            for peer, message, payloads in received:
                self._hear(peer, message, payloads)
            now_ms = self._clock.now_ms()
            if now_ms - ticked_ms >= _TICK_MS:
                ticked_ms = now_ms
                self._act(self._core.on_tick(now_ms), ())
                self._tell_state(now_ms, asked=dump_asked())
            events = self._core.take_events()
            if events:
                self._publish(events)
            elif (
                self._unchecked
                and self._core.capacity_blocks <= _CHECK_MAX_BLOCKS
                and now_ms - self._active_ms >= _CHECK_AFTER_MS
            ):
                self._core.check()
                self._unchecked = False

    def _counters(self) -> dict[str, float]:
        checked = {} if self._checks is None else self._checks.counters()
        told = {"protocol_violations_total": self._violations, "send_refused_total": self._unsent}
        violations = {series: float(kind.total) for series, kind in told.items()}
        return {**self._exchange.counters(), **violations, **checked}

    def _tell_state(self, now_ms: float, *, asked: bool) -> None:
        degraded = bool(self._core.degraded(now_ms))
        if asked or (degraded and not self._was_degraded):
            self._log.event("state" if asked else "stuck", **self._core.state(now_ms))
        self._was_degraded = degraded

    def _hear(self, peer: PeerId, message: AnyMessage, payloads: Sequence[Payload]) -> None:
        if isinstance(message, Ping):  # the report tells what is so now
            self._core.note(self._counters(), clock_gauges())
        else:
            self._active_ms, self._unchecked = self._clock.now_ms(), True
        lengths = [len(payload) for payload in payloads]
        try:
            if self._checks is not None:
                if isinstance(message, Put) and (refusal := self._checks.on_put(message, payloads)):
                    self._log.event("kv_mismatch", path="spill", peer=peer, call=message.call, text=refusal)
                    self._exchange.send(peer, Stored(call=message.call, n_blocks=0, text=refusal))
                    return
                if isinstance(message, Publish) and message.ok:
                    message = self._published(self._checks, peer, message)
            actions = self._core.on_message(peer, message, lengths, self._clock.now_ms())
            if self._checks is not None and isinstance(message, Release) and message.corrupt:
                self._judge(self._checks, peer, message)
        except ProtocolViolation as error:  # the peer's fault: say so, keep serving the others
            self._violations.note(peer, str(error))
            return
        self._act(actions, payloads)

    def _published(self, checks: PageChecks, peer: PeerId, message: Publish) -> Publish:
        """What was written is checked before anybody can see it; if it is wrong, its writer has given up."""
        wrong = checks.on_publish(message, self._core.reserved_pages(peer, message.call))
        if not wrong:
            return message
        self._log.event("kv_mismatch", path="spill", peer=peer, call=message.call, n_pages=len(wrong), pages=wrong[:8])
        return Publish(call=message.call, ok=False)

    def _judge(self, checks: PageChecks, peer: PeerId, message: Release) -> None:
        """A reader got wrong pages: if ours are wrong, nobody gets them again; else they went wrong on their way."""
        pages = self._core.cached_pages(message.corrupt)
        wrong = [name for name, place in pages.items() if not checks.still_right(place)]
        told = {"accused": len(pages), "wrong": [name.hex() for name in wrong][:8]}
        self._log.event("kv_accused", peer=peer, call=message.call, **told)
        self._core.condemn(wrong)

    def _sealed(self, answer: Message, blocks: Sequence[Pages]) -> Message:
        """The answer with the checksums of what it tells of."""
        if self._checks is None or not isinstance(answer, Found) or not answer.n_blocks:
            return answer
        return msgspec.structs.replace(answer, checksums=self._checks.of(answer.pages or blocks))

    def _on_event(self, event: Event) -> list[Action]:
        now_ms = self._clock.now_ms()
        match event:
            case GuestJoined(peer):
                self._core.on_peer_joined(peer, now_ms)
            case GuestGone(peer):
                self._core.on_peer_dead(peer)
            case DiskScanned(blocks, discarded_files):
                self._core.on_disk_scanned(blocks)
                self._log.event("disk_scanned", blocks=len(blocks), discarded_files=discarded_files)
            case DiskWritten(name, error_text, True):
                self._log.event("kv_mismatch", path="spill", block=name.hex(), text=error_text)
                self._core.on_disk_refused(name)
            case DiskWritten(name, error_text):
                return self._core.on_disk_written(name, error_text, now_ms)
            case DiskRead(name, ok):
                if not ok:
                    self._log.event("disk_block_bad", block=name.hex())
                return self._core.on_disk_read(name, ok=ok, now_ms=now_ms)
            case MembersRead(members, read_ms):
                succession = self._core.succession
                if succession.on_newer(newer_life(self._core.mine, members), read_ms):
                    self._log.event("succeeded", by=succession.successor, text=succession.refusal)
            case DiskDied(error) | ShareDied(error):
                raise error
        return []

    def _act(self, actions: Sequence[Action], payloads: Sequence[Payload]) -> None:
        for action in actions:
            match action:
                case Write(pages, frame):
                    self._memory.write(pages, payloads[frame])
                    if self._checks is not None:
                        self._checks.written(pages, payloads[frame])
                case Reply(to, answer, blocks):
                    frames = [self._memory.read(pages) for pages in blocks]
                    if not self._exchange.send(to, self._sealed(answer, blocks), frames):
                        self._unsent.note(to, type(answer).__name__)
                case ShapeMemory(layout, n_pages):
                    self._memory.shape(layout.page_bytes, n_pages)
                    if self._checks is not None:
                        self._checks.shape(layout, n_pages)
                    self._log.event("layout_known", blocks=self._core.capacity_blocks, page_bytes=layout.page_bytes)
                case ScanDisk() | WriteDisk() | ReadDisk() | DeleteDisk():
                    assert self._disk is not None, "a disk job without a disk"
                    self._disk.post(action)
                case DiskPaused(text, for_ms):
                    self._log.event("disk_writing_paused", text=text, for_ms=for_ms)
