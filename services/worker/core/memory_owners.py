"""Who has a worker's memory: weights, activations, KV of requests, KV kept for reuse, what is free. Pure.

Counted from the pool's pages, so that it is the same story as `Report.pages`, in bytes. Laws:

    device: weights + scratch beside the pool + memory of the pool
    host:   memory of the host buffer
"""

from collections.abc import Callable
from dataclasses import dataclass

from common.messages.liveness import MemoryPart
from kvstore.index.block_pool import BlockPool
from services.worker.core.resizing import Resizing


@dataclass(frozen=True, slots=True)
class Lent:
    """Memory that is not the KV's, though the pool's pages stand for most of it.

    Whole chunks count. Pages beside them that are out of use with them, as a block reaches into a lent chunk, are nobody's.
    """

    activation_pages: int = 0
    """Pages of the pool whose memory the forward pass has."""
    system_pages: int = 0
    """Pages of the pool that have no memory: the system has it."""
    scratch_bytes: int = 0
    """Of the forward pass, beside the pool."""


@dataclass(frozen=True, slots=True)
class Buffered:
    """Pages of the host buffer, as large as the pool's."""

    used_pages: int = 0
    capacity_pages: int = 0
    """0: there is no buffer."""


class MemoryOwners:
    """Owns nothing: reads the pool, its size, and what is told of lent memory and of the host buffer."""

    def __init__(
        self,
        pool: BlockPool,
        resizing: Resizing,
        *,
        weight_bytes: int,
        lent: Callable[[], Lent] = Lent,
        buffered: Callable[[], Buffered] = Buffered,
    ) -> None:
        """`lent`, `buffered`: what they are at the moment of a report; by default nothing is lent, and there is no buffer."""
        self._pool, self._resizing, self._weight_bytes = pool, resizing, weight_bytes
        self._lent, self._buffered = lent, buffered

    def parts(self) -> tuple[MemoryPart, ...]:
        """Every tier, in the order of MemoryPart's table."""
        return (*self._device(), *self._host())

    def _device(self) -> tuple[MemoryPart, ...]:
        counts, lent, page_bytes = self._pool.ledger.counts(), self._lent(), self._resizing.page_bytes
        pinned_pages = self._pool.cache.n_pinned * self._pool.pages_per_block
        request_pages = counts.reserved + counts.granted + counts.active + counts.quarantined + pinned_pages
        prefix_pages = counts.cached - pinned_pages
        held_pages = request_pages + prefix_pages + lent.activation_pages + lent.system_pages
        n_bytes = {
            "weights": self._weight_bytes,
            "activations": lent.scratch_bytes + lent.activation_pages * page_bytes,
            "kv_requests": request_pages * page_bytes,
            "kv_prefix": prefix_pages * page_bytes,
            "kv_free": (self._resizing.memory_pages - held_pages) * page_bytes,
            "released": lent.system_pages * page_bytes,
        }
        return tuple(MemoryPart(owner=owner, tier="device", n_bytes=value) for owner, value in n_bytes.items())

    def _host(self) -> tuple[MemoryPart, ...]:
        buffered, page_bytes = self._buffered(), self._resizing.page_bytes
        if not buffered.capacity_pages:
            return ()
        free_pages = buffered.capacity_pages - buffered.used_pages
        return (
            MemoryPart(owner="parked", tier="host", n_bytes=buffered.used_pages * page_bytes),
            MemoryPart(owner="parked_free", tier="host", n_bytes=free_pages * page_bytes),
        )
