"""Memory that is only counted: for tests of accounting, and for simulations of pools larger than this machine."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import OutOfChunks
from kvstore.memory.backend import Chunk, Range, VmMisuse
from kvstore.memory.mappings import MappingTable, create_each, require_mappings

if TYPE_CHECKING:
    import torch

_FIRST_ADDRESS = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class VmCosts:
    """What calls cost where memory is mapped by a driver: microseconds per chunk, or per call on a run of chunks."""

    create_us: float = 0.0
    release_us: float = 0.0
    map_us: float = 0.0
    access_call_us: float = 0.0
    access_chunk_us: float = 0.0
    unmap_call_us: float = 0.0
    unmap_chunk_us: float = 0.0


FREE = VmCosts()
MEASURED_GPU = VmCosts(create_us=18.5, release_us=40.0, map_us=5.0, access_chunk_us=37.0, unmap_chunk_us=25.5)
"""Of one H200, the middle of what was seen from 2 MiB to 64 MiB: every call costs by the chunk, however long that is and
however many share a call (docs/benchmarks/gpu.md)."""

_MANY_MAPPINGS = 500_000


class FakeBackend:
    """Follows every rule of VmBackend; its addresses must not be touched."""

    def __init__(
        self,
        capacity_bytes: int,
        granularity_bytes: int = 4096,
        *,
        costs: VmCosts = FREE,
        advance_ms: Callable[[float], None] = lambda _: None,
        max_mappings: int = _MANY_MAPPINGS,
    ) -> None:
        """`advance_ms` moves the caller's clock on by what a call costs; nothing sleeps."""
        self._max_mappings = max_mappings
        self._costs, self._advance_ms = costs, advance_ms
        self.spent_us = 0.0
        """What all calls have cost."""
        self._capacity_bytes, self._granularity_bytes = capacity_bytes, granularity_bytes
        self._table = MappingTable(granularity_bytes)
        self._next_address, self._next_offset_bytes = _FIRST_ADDRESS, 0
        self.created_bytes = 0
        self._vacated: set[Chunk] = set()

    @property
    def device(self) -> "torch.device":
        """A device whose tensors have shapes and no memory."""
        import torch  # here: simulations count memory without torch

        return torch.device("meta")

    @property
    def granularity_bytes(self) -> int:
        """Smallest mappable unit."""
        return self._granularity_bytes

    @property
    def live_mappings(self) -> int:
        """Chunks mapped now, each as often as it is mapped."""
        return self._table.live

    @property
    def max_mappings(self) -> int:
        """As given."""
        return self._max_mappings

    def reserve(self, length_bytes: int) -> Range:
        """Take an address range."""
        self._table.require_aligned("range", length_bytes)
        where = Range(self._next_address, length_bytes)
        self._next_address += length_bytes
        self._table.add_range(where)
        return where

    def unreserve(self, where: Range) -> None:
        """Give the addresses back."""
        self._table.drop_range(where)

    def create(self, length_bytes: int) -> Chunk:
        """Count a chunk. Raises OutOfChunks."""
        self._table.require_aligned("chunk", length_bytes)
        self._require_room(length_bytes)
        chunk = Chunk(self._next_offset_bytes, length_bytes)
        self._next_offset_bytes += length_bytes
        self.created_bytes += length_bytes
        self._table.add_chunk(chunk)
        self._spend(self._costs.create_us)
        return chunk

    def create_run(self, length_bytes: int, n_chunks: int) -> list[Chunk]:
        """Count chunks, all or none. Raises OutOfChunks."""
        return create_each(self, length_bytes, n_chunks)

    def release(self, chunk: Chunk) -> None:
        """Uncount a chunk."""
        if chunk not in self._vacated:
            self.vacate(chunk)
        self._vacated.discard(chunk)

    def vacate(self, chunk: Chunk) -> None:
        """Uncount a chunk that `refill` will count again."""
        self._table.drop_chunk(chunk)
        self.created_bytes -= chunk.length_bytes
        self._vacated.add(chunk)
        self._spend(self._costs.release_us)

    def refill(self, chunk: Chunk) -> None:
        """Count a vacated chunk again. Raises OutOfChunks."""
        if chunk not in self._vacated:
            raise VmMisuse(f"{chunk} was not vacated")
        self._require_room(chunk.length_bytes)
        self._vacated.remove(chunk)
        self.created_bytes += chunk.length_bytes
        self._table.add_chunk(chunk)
        self._spend(self._costs.create_us)

    def _require_room(self, length_bytes: int) -> None:
        if self.created_bytes + length_bytes > self._capacity_bytes:
            raise OutOfChunks(
                f"{self.created_bytes} of {self._capacity_bytes} bytes used; {length_bytes} more asked for"
            )

    def map_run(self, where: Range, offset_bytes: int, chunks: Sequence[Chunk]) -> None:
        """Note the mappings. Raises OutOfChunks above `max_mappings`."""
        require_mappings(self, len(chunks))
        self._table.add_run(where, offset_bytes, chunks)
        costs, n = self._costs, len(chunks)
        self._spend(n * (costs.map_us + costs.access_chunk_us) + costs.access_call_us)

    def unmap_run(self, where: Range, offset_bytes: int, n_chunks: int) -> list[Chunk]:
        """Forget the mappings."""
        chunks = self._table.remove_run(where, offset_bytes, n_chunks)
        self._spend(n_chunks * self._costs.unmap_chunk_us + self._costs.unmap_call_us)
        return chunks

    def keep_for_undoing(self, n_mappings: int) -> None:
        """Nothing: to undo needs no more than there was, and nobody else counts here."""

    def undoing(self) -> AbstractContextManager[None]:
        """Like other calls."""
        return nullcontext()

    def export_fds(self, chunks: Sequence[Chunk]) -> list[int]:
        """There is no memory to share: raises VmMisuse."""
        raise VmMisuse("counted memory cannot be shared with another process")

    def bytes_at(self, where: Range, n_bytes: int) -> "torch.Tensor":
        """A tensor with a shape and no memory."""
        import torch  # here: simulations count memory without torch

        del where
        return torch.empty(n_bytes, dtype=torch.uint8, device=self.device)

    def _spend(self, cost_us: float) -> None:
        self.spent_us += cost_us
        if cost_us:
            self._advance_ms(cost_us / 1000)

    def close(self) -> None:
        """Nothing is held."""
        self.created_bytes = 0
