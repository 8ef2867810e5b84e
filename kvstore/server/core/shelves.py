"""Everything of a KV store that depends on the layout of its blocks: the pool, the disk's index, reads and writes."""

from common.kv_layout import KvLayout
from common.leases import HELD_GRACE_MS, LEASE_MS
from common.messages.cache_events import CacheEvent
from common.messages.liveness import MemoryPart
from common.policy.eviction import EvictionPolicy
from kvstore.index.block_pool import BlockPool
from kvstore.index.event_log import EventLog
from kvstore.index.ledger import Ledger
from kvstore.server.core.disk_format import disk_bytes
from kvstore.server.core.disk_tier import DiskTier
from kvstore.server.core.reads import Reads
from kvstore.server.core.tally import Tally
from kvstore.server.core.writes import Writes

_HELD_MS = LEASE_MS + HELD_GRACE_MS
"""The longest lease, and grace."""


class Shelves:
    """Made once, when the layout is known. Parts are public to the core alone."""

    def __init__(
        self, layout: KvLayout, host_budget_bytes: int, disk_budget_bytes: int, policy: EvictionPolicy, tally: Tally
    ) -> None:
        self.block_bytes = layout.layers * layout.page_bytes
        self.capacity_blocks = host_budget_bytes // self.block_bytes
        self._file_bytes, self._tally = disk_bytes(layout), tally
        self.pool = BlockPool(Ledger(self.capacity_blocks * layout.layers), layout.layers, policy)
        self._events = EventLog("host")
        self.pool.listen(self._events)
        self.disk = DiskTier(self.pool, disk_budget_bytes // self._file_bytes, self.block_bytes, policy, tally)
        self.writes = Writes(self.pool, self.disk, tally)
        self.reads = Reads(self.pool, self.disk, tally, block_bytes=self.block_bytes, block_tokens=layout.block_tokens)

    def take_events(self) -> list[CacheEvent]:
        """Of both tiers, since the last call; each tier's in order."""
        return [*self._events.take(), *self.disk.events.take()]

    def counters(self) -> dict[str, float]:
        """Monotonic totals."""
        return {**self._tally.totals, "evicted_blocks_total": float(self.pool.evicted_blocks_total)}

    def gauges(self, now_ms: float) -> dict[str, float]:
        """What rises and falls."""
        n_blocks, n_files = len(self.pool.cache), len(self.disk)
        began = [self.reads.oldest_ms, self.writes.oldest_ms, self.disk.oldest_pin_ms]
        oldest_ms = min((began_ms for began_ms in began if began_ms is not None), default=now_ms)
        return {
            "cached_blocks": float(n_blocks),
            "pinned_blocks": float(self.pool.cache.n_pinned),
            "oldest_pin_ms": now_ms - oldest_ms,
            "blocks{tier=host}": float(n_blocks),
            "blocks{tier=disk}": float(n_files),
            "bytes{tier=host}": float(n_blocks * self.block_bytes),
            "bytes{tier=disk}": float(n_files * self._file_bytes),
            "waiting_disk_writes": float(self.disk.n_waiting),
        }

    def held_too_long(self, now_ms: float) -> str:
        """Why this store should not be used while another one is there; empty if it may."""
        for what, since_ms in (("a reservation", self.writes.oldest_ms), ("a find", self.reads.oldest_ms)):
            if since_ms is not None and now_ms - since_ms > _HELD_MS:
                return f"{what} holds pages for {(now_ms - since_ms) / 1000:.0f} s, longer than any lease and its grace"
        return ""

    def state(self, now_ms: float) -> dict[str, object]:
        """What is under way, for the log."""
        return {
            "degraded": self.held_too_long(now_ms),
            "reservations": self.writes.described(now_ms),
            "finds": self.reads.described(now_ms),
            **self.gauges(now_ms),
        }

    def memory(self) -> tuple[MemoryPart, ...]:
        """Who has the memory. Blocks that are being written count as cached; of the disk, what files take."""
        counts = self.pool.ledger.counts()
        page_bytes = self.block_bytes // self.pool.pages_per_block
        host = (
            MemoryPart(owner="cached", tier="host", n_bytes=(counts.total - counts.free) * page_bytes),
            MemoryPart(owner="free", tier="host", n_bytes=counts.free * page_bytes),
        )
        if not self.disk.capacity_blocks:
            return host
        return (*host, MemoryPart(owner="cached", tier="disk", n_bytes=len(self.disk) * self._file_bytes))

    def check(self) -> None:
        """Raise LedgerMisuse or AssertionError if a law is broken. O(pages)."""
        self.pool.check()
        self.disk.check()
        self.reads.check()
