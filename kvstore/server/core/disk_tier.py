"""What lies on disk below the host memory, and what is on its way there. Pure.

A block is written behind: after it was published it stays pinned in host memory until its file is complete. Writes that
are waiting are bounded; when there are too many, blocks are simply not written. Files are content-addressed, so a
block that is on disk already is never written again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from common.block_hash import BlockHash
from common.ids import Owner
from common.messages.blocks import BlockName
from common.policy.eviction import EvictionPolicy
from kvstore.index.block_cache import BlockCache, CachedBlock
from kvstore.index.block_pool import BlockPool
from kvstore.index.event_log import EventLog
from kvstore.index.ledger import PageIds
from kvstore.server.core.actions import Action, DeleteDisk, DiskPaused, WriteDisk
from kvstore.server.core.tally import Tally

PAUSE_MS = 30_000.0
"""How long nothing is written after a write failed: a full disk stays full for a while."""
MAX_WAITING_BYTES = 256 * 2**20
"""Blocks waiting to be written are pinned in host memory; so much of it, and a quarter of it, at the most."""
_NO_PAGES: PageIds = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class _Writing:
    block: BlockName
    owner: Owner
    began_ms: float


@dataclass(slots=True)
class DiskState:
    """What changes with every job."""

    scanned: bool = False
    """Until the folder was read, nobody knows what lies there and nothing is written."""
    paused_until_ms: float = 0.0
    writing: dict[BlockHash, _Writing] = field(default_factory=dict)


class DiskTier:
    """Owns the index of the disk. A block leaves it by eviction, or when its file turned out to be bad."""

    def __init__(
        self, pool: BlockPool, capacity_blocks: int, block_bytes: int, policy: EvictionPolicy, tally: Tally
    ) -> None:
        """`capacity_blocks` 0: there is no disk."""
        self._pool, self._tally, self._block_bytes = pool, tally, block_bytes
        self.capacity_blocks = capacity_blocks
        self._cache: BlockCache[PageIds] = BlockCache(policy)
        self._max_writing = max(
            1, min(MAX_WAITING_BYTES // block_bytes, pool.ledger.total_pages // pool.pages_per_block // 4)
        )
        self._state = DiskState()
        self.events = EventLog("disk")

    def __len__(self) -> int:
        return len(self._cache)

    def __contains__(self, name: BlockHash) -> bool:
        return name in self._cache

    @property
    def oldest_pin_ms(self) -> float | None:
        """Since when (on the caller's clock) the longest-waiting write waits."""
        return min((writing.began_ms for writing in self._state.writing.values()), default=None)

    @property
    def n_waiting(self) -> int:
        """Blocks that wait to be written."""
        return len(self._state.writing)

    def on_scanned(self, blocks: Sequence[BlockName]) -> None:
        """The folder was read: these are there, the least recently used first."""
        self._state.scanned = self.capacity_blocks > 0
        for block in blocks[-self.capacity_blocks :]:
            self._insert(block)

    def keep(self, blocks: Sequence[BlockName], now_ms: float) -> list[Action]:
        """Write these published blocks if there is time and room for them; those that cannot be written are not."""
        state, actions = self._state, list[Action]()
        if not state.scanned or now_ms < state.paused_until_ms:
            return []
        for block in blocks:
            name = BlockHash(block.name)
            if name in self._cache or name in state.writing:
                continue
            if len(state.writing) >= self._max_writing or not self._make_room(actions):
                break
            owner = Owner(f"disk:{name.hex()}")
            pages = self._pool.take(owner, [name])
            state.writing[name] = _Writing(block, owner, now_ms)
            actions.append(WriteDisk(block, tuple(pages[0].tolist())))
        return actions

    def _make_room(self, actions: list[Action]) -> bool:
        """Room for one more file."""
        if len(self._cache) + len(self._state.writing) < self.capacity_blocks:
            return True
        victims = self._cache.evict(1)
        for victim in victims:
            self._gone(victim)
            actions.append(DeleteDisk(victim.name))
        self._tally.add("disk_evicted_blocks_total", len(victims))
        return bool(victims)

    def on_written(self, name: BlockHash, error_text: str, now_ms: float) -> list[Action]:
        """A WriteDisk has ended; `error_text` is empty if the file is there."""
        writing = self._state.writing.pop(name)
        self._pool.release(writing.owner)
        if not error_text:
            self._insert(writing.block)
            self._tally.add("kv_bytes_total{direction=host_to_disk}", self._block_bytes)
            return []
        paused = now_ms < self._state.paused_until_ms
        self._state.paused_until_ms = now_ms + PAUSE_MS
        return [] if paused else [DiskPaused(error_text, PAUSE_MS)]

    def on_refused(self, name: BlockHash) -> None:
        """A WriteDisk was not begun, for a reason of the block's own: the disk is well."""
        self._pool.release(self._state.writing.pop(name).owner)

    def begin_read(self, name: BlockHash) -> BlockName:
        """The block is about to be read: it stays until `end_read`."""
        self._cache.pin([name])
        self._cache.use([name])
        block = self._cache.get(name)
        assert block is not None
        return BlockName(name, block.parent, block.depth)

    def end_read(self, name: BlockHash, *, ok: bool) -> None:
        """Not ok: the file was bad and is deleted."""
        self._cache.unpin([name])
        if ok:
            self._tally.add("kv_bytes_total{direction=disk_to_host}", self._block_bytes)
            return
        self._tally.add("load_failures_total", 1)
        self._gone(self._cache.remove(name))

    def check(self) -> None:
        """Raise if a count is wrong, or if there is more than fits."""
        self._cache.check()
        assert len(self._cache) + len(self._state.writing) <= self.capacity_blocks, (
            f"{len(self._cache)} blocks on disk and {len(self._state.writing)} on their way; {self.capacity_blocks} fit"
        )

    def _insert(self, block: BlockName) -> None:
        name = BlockHash(block.name)
        if self._cache.insert([name], [_NO_PAGES], parent=BlockHash(block.parent), depth=block.depth):
            stored = self._cache.get(name)
            assert stored is not None
            self.events.on_stored(stored)

    def _gone(self, block: CachedBlock[PageIds]) -> None:
        self.events.on_removed(block)
