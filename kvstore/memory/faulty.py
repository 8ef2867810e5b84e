"""A back end whose calls meet the fault kit: slow, or without room for what they were asked.

Each call strikes `memory` with its own name as the peer: `create`, `map`, `unmap` or `refill`. `unmap` fails only where
its contract lets it: for a part of a stretch that is mapped. Calls under `undoing` are spared: the back end inside keeps
what they need.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from common.errors import OutOfChunks
from common.faults.points import Kind, Point, Side
from common.net.fault_kit import FaultKit
from kvstore.memory.backend import Chunk, Range, VmBackend
from kvstore.memory.chunks import Refillable

if TYPE_CHECKING:
    import torch

Sleep = Callable[[float], None]
"""Takes seconds."""
_Place = tuple[int, int]
"""Address of a range, and bytes from there: ranges that happen to be neighbours are no stretch."""


class FaultyBackend:
    """Follows every rule of VmBackend; lists what is mapped, to know which `unmap` may fail."""

    def __init__(self, inner: VmBackend, kit: FaultKit, sleep: Sleep = time.sleep) -> None:
        self._inner, self._kit, self._sleep = inner, kit, sleep
        self._begins: dict[_Place, _Place] = {}  # of every mapped chunk -> its end
        self._ends: dict[_Place, _Place] = {}
        self._undoing = False

    @property
    def device(self) -> "torch.device":
        """As inside."""
        return self._inner.device

    @property
    def granularity_bytes(self) -> int:
        """As inside."""
        return self._inner.granularity_bytes

    @property
    def live_mappings(self) -> int:
        """As inside."""
        return self._inner.live_mappings

    @property
    def max_mappings(self) -> int:
        """As inside."""
        return self._inner.max_mappings

    def reserve(self, length_bytes: int) -> Range:
        """As inside."""
        return self._inner.reserve(length_bytes)

    def unreserve(self, where: Range) -> None:
        """As inside."""
        self._inner.unreserve(where)

    def create(self, length_bytes: int) -> Chunk:
        """As inside, with faults. Raises OutOfChunks."""
        self._strike("create", may_fail=True)
        return self._inner.create(length_bytes)

    def create_run(self, length_bytes: int, n_chunks: int) -> list[Chunk]:
        """As inside, with faults. Raises OutOfChunks."""
        self._strike("create", may_fail=True)
        return self._inner.create_run(length_bytes, n_chunks)

    def release(self, chunk: Chunk) -> None:
        """As inside."""
        self._inner.release(chunk)

    def map_run(self, where: Range, offset_bytes: int, chunks: Sequence[Chunk]) -> None:
        """As inside, with faults. Raises OutOfChunks."""
        begin = where.address, offset_bytes
        self._strike("map", may_fail=True)
        self._inner.map_run(where, offset_bytes, chunks)
        for chunk in chunks:
            end = where.address, begin[1] + chunk.length_bytes
            self._begins[begin], self._ends[end] = end, begin
            begin = end

    def unmap_run(self, where: Range, offset_bytes: int, n_chunks: int) -> list[Chunk]:
        """As inside, with faults. Raises OutOfChunks."""
        begin = first = where.address, offset_bytes
        for _ in range(n_chunks):
            begin = self._begins.get(begin, begin)
        self._strike("unmap", may_fail=first in self._ends or begin in self._begins)
        chunks = self._inner.unmap_run(where, offset_bytes, n_chunks)
        for _ in range(n_chunks):
            first = self._begins.pop(first)
            del self._ends[first]
        return chunks

    def keep_for_undoing(self, n_mappings: int) -> None:
        """As inside."""
        self._inner.keep_for_undoing(n_mappings)

    @contextmanager
    def undoing(self) -> Iterator[None]:
        """As inside, without faults."""
        was, self._undoing = self._undoing, True
        try:
            with self._inner.undoing():
                yield
        finally:
            self._undoing = was

    def export_fds(self, chunks: Sequence[Chunk]) -> list[int]:
        """As inside."""
        return self._inner.export_fds(chunks)

    def bytes_at(self, where: Range, n_bytes: int) -> "torch.Tensor":
        """As inside."""
        return self._inner.bytes_at(where, n_bytes)

    def close(self) -> None:
        """As inside."""
        self._inner.close()

    def _strike(self, call: str, *, may_fail: bool) -> None:
        if self._undoing:
            return
        outcome = self._kit.strike(Point.MEMORY, Side.WORK, call)
        late_ms = outcome.ms_of(Kind.DELAY)
        if late_ms:
            self._sleep(late_ms / 1000)
        if outcome.has(Kind.FAIL, Kind.CUT) and may_fail:
            raise OutOfChunks(f"injected failure: {call}")


class RefillableFaultyBackend(FaultyBackend):
    """Of a back end whose chunks can lose their memory and get other memory in its place."""

    def __init__(self, inner: VmBackend, kit: FaultKit, sleep: Sleep = time.sleep) -> None:
        super().__init__(inner, kit, sleep)
        assert isinstance(inner, Refillable), "such a back end"
        self._chunks: Refillable = inner

    def vacate(self, chunk: Chunk) -> None:
        """As inside."""
        self._chunks.vacate(chunk)

    def refill(self, chunk: Chunk) -> None:
        """As inside, with faults. Raises OutOfChunks."""
        self._strike("refill", may_fail=True)
        self._chunks.refill(chunk)


def faulty_backend(inner: VmBackend, kit: FaultKit) -> VmBackend:
    """Whichever has what `inner` has."""
    return RefillableFaultyBackend(inner, kit) if isinstance(inner, Refillable) else FaultyBackend(inner, kit)
