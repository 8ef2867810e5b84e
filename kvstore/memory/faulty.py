"""A back end whose calls meet the fault kit: slow, or without room for what they were asked.

Each call strikes `memory` with its own name as the peer: `create`, `map`, `unmap` or `refill`. `unmap` fails only where
its contract lets it: for a part of a stretch that is mapped. Calls that undo what came before a failure are spared, as
they would be: they need no more than there was. They are known by that: each is the reverse of a call since the failure
before, and nothing else comes between.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from common.errors import OutOfChunks
from common.faults.points import Kind, Point, Side
from common.net.fault_kit import FaultKit
from kvstore.memory.backend import Chunk, Range, VmBackend
from kvstore.memory.chunks import Refillable

if TYPE_CHECKING:
    import torch

_REMEMBERED_CALLS = 1024  # more than any one change of memory has
Sleep = Callable[[float], None]
"""Takes seconds."""
_Call = tuple[str, int, int]
"""`map` or `unmap`, the address, chunks."""
_Place = tuple[int, int]
"""Address of a range, and bytes from there: ranges that happen to be neighbours are no stretch."""


class FaultyBackend:
    """Follows every rule of VmBackend; lists what is mapped, to know which `unmap` may fail."""

    def __init__(self, inner: VmBackend, kit: FaultKit, sleep: Sleep = time.sleep) -> None:
        self._inner, self._kit, self._sleep = inner, kit, sleep
        self._begins: dict[_Place, _Place] = {}  # of every mapped chunk -> its end
        self._ends: dict[_Place, _Place] = {}
        self._undo_done: deque[_Call] = deque(
            maxlen=_REMEMBERED_CALLS
        )  # what would undo the calls since the last failure
        self._spared: set[_Call] = set()

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
        address, begin = where.address + offset_bytes, (where.address, offset_bytes)
        if not self._undoes(("map", address, len(chunks))):
            self._strike("map", may_fail=True)
        self._inner.map_run(where, offset_bytes, chunks)
        self._undo_done.append(("unmap", address, len(chunks)))
        for chunk in chunks:
            end = where.address, begin[1] + chunk.length_bytes
            self._begins[begin], self._ends[end] = end, begin
            begin = end

    def unmap_run(self, where: Range, offset_bytes: int, n_chunks: int) -> list[Chunk]:
        """As inside, with faults. Raises OutOfChunks."""
        address, first = where.address + offset_bytes, (where.address, offset_bytes)
        begin = first
        for _ in range(n_chunks):
            begin = self._begins.get(begin, begin)
        if not self._undoes(("unmap", address, n_chunks)):
            self._strike("unmap", may_fail=first in self._ends or begin in self._begins)
        chunks = self._inner.unmap_run(where, offset_bytes, n_chunks)
        self._undo_done.append(("map", address, n_chunks))
        for _ in range(n_chunks):
            first = self._begins.pop(first)
            del self._ends[first]
        return chunks

    def export_fds(self, chunks: Sequence[Chunk]) -> list[int]:
        """As inside."""
        return self._inner.export_fds(chunks)

    def bytes_at(self, where: Range, n_bytes: int) -> "torch.Tensor":
        """As inside."""
        return self._inner.bytes_at(where, n_bytes)

    def close(self) -> None:
        """As inside."""
        self._inner.close()

    def _undoes(self, call: _Call) -> bool:
        """Whether it is spared, once."""
        spared = call in self._spared
        self._spared.discard(call)
        return spared

    def _strike(self, call: str, *, may_fail: bool) -> None:
        self._spared.clear()
        outcome = self._kit.strike(Point.MEMORY, Side.WORK, call)
        late_ms = outcome.ms_of(Kind.DELAY)
        if late_ms:
            self._sleep(late_ms / 1000)
        if outcome.has(Kind.FAIL, Kind.CUT) and may_fail:
            self._spared = set(self._undo_done)
            self._undo_done.clear()
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
