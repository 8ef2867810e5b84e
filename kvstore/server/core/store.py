"""Decisions of the KV store: message or event in, actions out. No sockets, no memory, no files, no clock.

Blocks are named by content and the name is salted by the model, so the store trusts any peer that can name a block. All
blocks have one layout: that of the model it was started for, else of the first worker that says Hello.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from common.block_hash import BlockHash
from common.errors import ConfigError, ProtocolViolation
from common.ids import PeerId
from common.kv_layout import KvLayout
from common.messages import AnyMessage
from common.messages.blocks import BlockName, Find, Found, Publish, Put, Release, Reserve, Reserved, Stored
from common.messages.cache_events import CacheEvent
from common.messages.liveness import (
    Hello,
    Member,
    PageCounts,
    Ping,
    QueueCounts,
    Refused,
    Report,
    Welcome,
)
from common.policy.eviction import EVICTION_POLICIES
from common.policy.succession import Succession
from common.units import format_bytes
from kvstore.server.core.actions import Action, Pages, Reply, ScanDisk, ShapeMemory
from kvstore.server.core.fitting import difference, layout_of
from kvstore.server.core.shelves import Shelves
from kvstore.server.core.tally import Tally

SILENT_MS = 3_000.0
"""A writer that says nothing for so long may be dead or not: its reservations count as quarantined."""
_NO_LAYOUT = "this store does not know the layout of blocks yet: say Hello with a model first"


@dataclass(frozen=True, slots=True)
class Budget:
    """What a store may use."""

    host_bytes: int
    disk_bytes: int = 0
    """0: no disk."""
    eviction: str = "lru"
    """A key of EVICTION_POLICIES."""


class KvStoreCore:
    """Owns the index of one store. The shell performs all actions of a call, in order, before the next call."""

    def __init__(self, mine: Member, budget: Budget, layout: KvLayout | None) -> None:
        """`layout` is that of the model to be served, if it is known. Raises ConfigError if no block would fit."""
        self.mine, self._budget = mine, budget
        self._tally = Tally()
        self._layout: KvLayout | None = None
        self._shelves: Shelves | None = None
        self._writers_heard_ms: dict[PeerId, float] = {}  # from `on_peer_joined` to `on_peer_dead`
        self._event_number = 0
        self.succession = Succession()
        self._noted: dict[str, float] = {}
        self._noted_gauges: dict[str, float] = {}
        if layout is not None and (refusal := self._fix_layout(layout)):
            raise ConfigError(refusal)

    @property
    def capacity_blocks(self) -> int:
        """Blocks that fit into host memory; 0 until their layout is known."""
        return 0 if self._shelves is None else self._shelves.capacity_blocks

    def start(self) -> list[Action]:
        """What to do first, and again when a Hello brought the layout."""
        layout, shelves = self._layout, self._shelves
        if layout is None or shelves is None:
            return []
        actions: list[Action] = [ShapeMemory(layout, shelves.capacity_blocks * layout.layers)]
        if shelves.disk.capacity_blocks:
            actions.append(ScanDisk(layout, shelves.disk.capacity_blocks))
        return actions

    @property
    def over(self) -> bool:
        """A newer life has this store's name, and nobody reads here any more. What others still write, nobody would read."""
        return self.succession.over and (self._shelves is None or self._shelves.reads.idle)

    # -- messages

    def on_message(self, peer: PeerId, message: AnyMessage, frames_bytes: Sequence[int], now_ms: float) -> list[Action]:
        """Decide on one message; `frames_bytes` are the lengths of its payload frames. Raises ProtocolViolation."""
        if peer in self._writers_heard_ms:
            self._writers_heard_ms[peer] = now_ms
        match message:
            case Hello(member=member):
                return self._greet(peer, member)
            case Ping(sequence=sequence):
                return [Reply(peer, self.report(sequence, now_ms))]
            case Reserve():
                return [Reply(peer, self._reserve(peer, message, now_ms))]
            case Put():
                return self._put(peer, message, frames_bytes, now_ms)
            case Publish(call=call):
                if self._shelves is None:
                    return [Reply(peer, Stored(call=call, n_blocks=0))]
                return self._shelves.writes.publish(peer, message, now_ms)
            case Find(call=call):
                if self._shelves is None or self.succession.over:
                    return [Reply(peer, Found(call=call, n_blocks=0))]
                return self._shelves.reads.find(peer, message, now_ms)
            case Release(call=call):
                if self._shelves is not None:
                    self._shelves.reads.release(peer, call)
                return []
            case _:
                raise ProtocolViolation(f"a KV store got {type(message).__name__} from {peer}")

    def _greet(self, peer: PeerId, member: Member) -> list[Action]:
        if member.model is None:
            return [Reply(peer, Welcome(member=self.mine))]
        actions: list[Action] = []
        if self._layout is None:
            learned = layout_of(member.model)
            refusal = f"{self.mine.id} {learned}" if isinstance(learned, str) else self._fix_layout(learned)
            actions = [] if refusal else self.start()
        else:
            rows = difference(self._layout, member.model)
            refusal = f"{self.mine.id} keeps KV of another layout: {rows}" if rows else ""
        return [*actions, Reply(peer, Refused(text=refusal) if refusal else Welcome(member=self.mine))]

    def _fix_layout(self, layout: KvLayout) -> str:
        block_bytes = layout.layers * layout.page_bytes
        if block_bytes > self._budget.host_bytes:
            return (
                f"--host-memory={format_bytes(self._budget.host_bytes)} is too small: a block takes {block_bytes} bytes "
                f"and the store has {self._budget.host_bytes}"
            )
        policy = EVICTION_POLICIES[self._budget.eviction]()
        shelves = Shelves(layout, self._budget.host_bytes, self._budget.disk_bytes, policy, self._tally)
        if self._budget.disk_bytes and not shelves.disk.capacity_blocks:
            return (
                f"--disk-size={format_bytes(self._budget.disk_bytes)} is too small for a block of {block_bytes} bytes"
            )
        self._layout, self._shelves = layout, shelves
        return ""

    def _reserve(self, peer: PeerId, reserve: Reserve, now_ms: float) -> Reserved:
        nothing = ((),) * len(reserve.blocks)
        if self._shelves is None or self.succession.over:
            return Reserved(call=reserve.call, pages=nothing, text=self.succession.refusal or _NO_LAYOUT)
        if peer not in self._writers_heard_ms:  # nobody would tell us of its death
            return Reserved(call=reserve.call, pages=nothing, text=f"{peer} does not map the memory of this store")
        return self._shelves.writes.reserve(peer, reserve, now_ms)

    def _put(self, peer: PeerId, put: Put, frames_bytes: Sequence[int], now_ms: float) -> list[Action]:
        refusal = self.succession.refusal or self._refusal(put, frames_bytes)
        if refusal or self._shelves is None:
            self._tally.add("refused_blocks_total", len(put.blocks))
            return [Reply(peer, Stored(call=put.call, n_blocks=0, text=refusal))]
        return self._shelves.writes.put(peer, put, frames_bytes, now_ms)

    def _refusal(self, put: Put, frames_bytes: Sequence[int]) -> str:
        if len(frames_bytes) != len(put.blocks):
            return f"{len(put.blocks)} blocks came with {len(frames_bytes)} payload frames; each needs one"
        if self._shelves is None:
            return _NO_LAYOUT
        block_bytes = self._shelves.block_bytes
        wrong = [n_bytes for n_bytes in frames_bytes if n_bytes != block_bytes]
        return f"blocks of {wrong[0]} bytes; this store keeps blocks of {block_bytes} bytes" if wrong else ""

    def reserved_pages(self, peer: PeerId, call: int) -> tuple[Pages, ...]:
        """What a Publish of this call would make visible: [block][layer]."""
        return () if self._shelves is None else self._shelves.writes.reserved_pages(peer, call)

    def cached_pages(self, names: Sequence[bytes]) -> dict[BlockHash, Pages]:
        """[layer] of those of these blocks that are in host memory."""
        cache = None if self._shelves is None else self._shelves.pool.cache
        found = {} if cache is None else {BlockHash(name): cache.get(BlockHash(name)) for name in names}
        return {name: tuple(block.place.tolist()) for name, block in found.items() if block is not None}

    def condemn(self, names: Sequence[BlockHash]) -> None:
        """What lies in the pages of these cached blocks is not what was stored: nobody finds them any more."""
        if names:
            self._known().reads.condemn(names)

    # -- events

    def on_peer_joined(self, peer: PeerId, now_ms: float) -> None:
        """It maps our memory: it may reserve."""
        self._writers_heard_ms[peer] = now_ms

    def on_peer_dead(self, peer: PeerId) -> None:
        """It maps our memory no more: neither reads nor writes of it are under way."""
        self._writers_heard_ms.pop(peer, None)
        if self._shelves is not None:
            self._shelves.writes.on_peer_dead(peer)
            self._shelves.reads.on_peer_dead(peer)

    def on_disk_scanned(self, blocks: Sequence[BlockName]) -> None:
        """The end of ScanDisk: what lies there, the least recently used first."""
        self._known().disk.on_scanned(blocks)

    def on_disk_written(self, name: bytes, error_text: str, now_ms: float) -> list[Action]:
        """The end of a WriteDisk; `error_text` is empty if the file is there."""
        return self._known().disk.on_written(BlockHash(name), error_text, now_ms)

    def on_disk_refused(self, name: bytes) -> None:
        """A WriteDisk was not begun: the block's pages are wrong. Others are written as before."""
        self._known().disk.on_refused(BlockHash(name))
        self.condemn([BlockHash(name)])

    def on_disk_read(self, name: bytes, *, ok: bool, now_ms: float) -> list[Action]:
        """The end of a ReadDisk. Not ok: the file was bad or gone, and is deleted."""
        return self._known().reads.on_disk_read(BlockHash(name), ok=ok, now_ms=now_ms)

    def on_tick(self, now_ms: float) -> list[Action]:
        """End what is over."""
        if self._shelves is None:
            return []
        for peer, heard_ms in self._writers_heard_ms.items():
            if now_ms - heard_ms >= SILENT_MS:
                self._shelves.writes.quarantine(peer)
        return self._shelves.reads.on_tick(now_ms)

    def _known(self) -> Shelves:
        assert self._shelves is not None, "a disk event before the layout was known"
        return self._shelves

    # -- news

    def note(self, counters: dict[str, float], gauges: dict[str, float]) -> None:
        """Counters and gauges of the shell as they are now: the next report tells them."""
        self._noted, self._noted_gauges = counters, gauges

    def take_events(self) -> list[CacheEvent]:
        """What happened in host memory and on disk since the last call, numbered as one sequence."""
        if self._shelves is None:
            return []
        events = self._shelves.take_events()
        first = self._event_number + 1
        self._event_number += len(events)
        return [msgspec.structs.replace(event, number=first + place) for place, event in enumerate(events)]

    def report(self, sequence: int, now_ms: float) -> Report:
        """State for whoever pinged."""
        shelves = self._shelves
        return Report(
            worker=self.mine.id,
            role=self.mine.role,
            incarnation=self.mine.incarnation,
            sequence=sequence,
            pages=PageCounts() if shelves is None else shelves.pool.ledger.counts(),
            queue=QueueCounts(),
            counters={**(self._tally.totals if shelves is None else shelves.counters()), **self._noted},
            gauges=self._gauges(now_ms),
            memory=() if shelves is None else shelves.memory(),
            draining=self.succession.over,
            degraded=self.degraded(now_ms),
        )

    def _gauges(self, now_ms: float) -> dict[str, float]:
        own = {} if self._shelves is None else self._shelves.gauges(now_ms)
        return {**own, "degraded": float(bool(self.degraded(now_ms))), **self._noted_gauges}

    def degraded(self, now_ms: float) -> str:
        """Why another store should be preferred; empty if none need be."""
        return "" if self._shelves is None else self._shelves.held_too_long(now_ms)

    def state(self, now_ms: float) -> dict[str, object]:
        """All that somebody needs who wants to know why nothing moves; JSON."""
        writers = {peer: round(now_ms - heard_ms) for peer, heard_ms in self._writers_heard_ms.items()}
        pages = {} if self._shelves is None else msgspec.to_builtins(self._shelves.pool.ledger.counts())
        shelves = {} if self._shelves is None else self._shelves.state(now_ms)
        return {"pages": pages, "writers_heard_ms": writers, **shelves}

    def check(self) -> None:
        """Raise LedgerMisuse or AssertionError if a page is lost or a count is wrong."""
        if self._shelves is not None:
            self._shelves.check()
