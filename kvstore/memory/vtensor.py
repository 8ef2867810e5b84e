"""One contiguous address range whose memory comes and goes in chunks at its end."""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import OutOfChunks
from kvstore.memory.backend import Chunk, VmMisuse
from kvstore.memory.chunks import ChunkPool
from kvstore.memory.mappings import stretches
from kvstore.memory.undo import undo


class VirtualTensor:
    """Owns its address range and the chunks mapped there. One thread uses it.

    Chunk i is always mapped at i * chunk_bytes, so an address stays valid while its chunk is mapped, however much the
    range grows. Chunks may be lifted out of it for a while; nothing else ever takes their places. Source: vTensor (arXiv 2407.15309).
    """

    def __init__(self, pool: ChunkPool, capacity_bytes: int, *, owner: str) -> None:
        """Reserve addresses for `capacity_bytes`, rounded up to whole chunks; no memory yet. Raises ConfigError."""
        self._pool, self._owner = pool, owner
        self._capacity_chunks = -(-capacity_bytes // pool.chunk_bytes)
        self._range = pool.backend.reserve(self._capacity_chunks * pool.chunk_bytes)
        self._chunks: list[Chunk] = []
        self._away: set[int] = set()  # places of chunks that are not mapped here for a while
        self._released = False

    @property
    def address(self) -> int:
        """Where the range begins."""
        return self._range.address

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """What belongs here, in address order, also what is lifted out now."""
        return tuple(self._chunks)

    def chunk(self, index: int) -> Chunk:
        """What is mapped at index * chunk_bytes."""
        return self._chunks[index]

    @property
    def mapped_bytes(self) -> int:
        """Usable length, from the beginning of the range."""
        return len(self._chunks) * self._pool.chunk_bytes

    def grow(self, n_chunks: int) -> None:
        """Add memory at the end, all or nothing. Raises OutOfChunks; VmMisuse beyond the capacity."""
        if self._released or len(self._chunks) + n_chunks > self._capacity_chunks:
            raise VmMisuse(f"{self._owner}: {len(self._chunks)} + {n_chunks} of {self._capacity_chunks} chunks")
        fresh = self._pool.alloc(self._owner, n_chunks)
        try:
            self._pool.backend.map_run(self._range, self.mapped_bytes, fresh)
        except OutOfChunks:
            self._pool.free(self._owner, fresh)
            raise
        self._chunks += fresh

    def shrink(self, n_chunks: int) -> None:
        """Give memory back from the end. The caller guarantees that nothing uses those addresses any more."""
        if not 0 <= n_chunks <= len(self._chunks):
            raise VmMisuse(f"{self._owner}: cannot give back {n_chunks} of {len(self._chunks)} chunks")
        kept = len(self._chunks) - n_chunks
        if lifted := [place for place in self._away if place >= kept]:
            raise VmMisuse(f"{self._owner}: chunks {sorted(lifted)} are lifted out and cannot be given back")
        leaving = self._pool.backend.unmap_run(self._range, kept * self._pool.chunk_bytes, n_chunks)
        self._pool.free(self._owner, leaving)
        del self._chunks[kept:]

    def keep_for_undoing(self, places: Sequence[int]) -> None:
        """Before these chunks move between here and elsewhere, where they lie in this order: have the mappings that it may
        take to put them back. Raises OutOfChunks, and then nothing may move."""
        runs = _runs(places)
        here = sum(2 + len(stretches(self._chunks[first : first + n_chunks])) for first, n_chunks in runs)
        self._pool.backend.keep_for_undoing(here + 1 + len(stretches([self._chunks[place] for place in places])))

    def lift(self, places: Sequence[int]) -> list[Chunk]:
        """Take these chunks out of the range, all or none; they stay its own. Raises OutOfChunks if the system bears too few
        mappings to divide one, or to undo that. The caller guarantees that nothing uses their addresses."""
        if len(set(places)) != len(places) or any(place in self._away or not self._is_here(place) for place in places):
            raise VmMisuse(f"{self._owner}: chunks {list(places)} are not all here, each named once")
        self.keep_for_undoing(places)
        self._take_out(places)
        return [self._chunks[place] for place in places]

    def _take_out(self, places: Sequence[int]) -> None:
        backend, chunk_bytes = self._pool.backend, self._pool.chunk_bytes
        lifted: list[tuple[int, int]] = []
        try:
            for first, n_chunks in _runs(places):
                backend.unmap_run(self._range, first * chunk_bytes, n_chunks)
                lifted.append((first, n_chunks))
        except OutOfChunks:
            with undo(backend):
                for first, n_chunks in lifted:
                    backend.map_run(self._range, first * chunk_bytes, self._chunks[first : first + n_chunks])
            raise
        self._away.update(places)

    def lay(self, places: Sequence[int]) -> None:
        """Put lifted chunks back in their places, all or none. Raises OutOfChunks if the system bears no more mappings."""
        if len(set(places)) != len(places) or not self._away.issuperset(places):
            raise VmMisuse(f"{self._owner}: chunks {list(places)} are not all lifted out, each named once")
        laid: list[tuple[int, int]] = []
        backend, chunk_bytes = self._pool.backend, self._pool.chunk_bytes
        try:
            for first, n_chunks in _runs(places):
                backend.map_run(self._range, first * chunk_bytes, self._chunks[first : first + n_chunks])
                laid.append((first, n_chunks))
        except OutOfChunks:
            with undo(backend):
                for first, n_chunks in laid:
                    backend.unmap_run(self._range, first * chunk_bytes, n_chunks)
            raise
        self._away.difference_update(places)

    def _is_here(self, place: int) -> bool:
        return 0 <= place < len(self._chunks)

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A view of the beginning of the range, without copying. It must not outlive the memory beneath it."""
        count = 1
        for extent in shape:
            count *= extent
        needed_bytes = count * dtype.itemsize
        if needed_bytes > self.mapped_bytes:
            raise VmMisuse(f"{self._owner}: a view of {needed_bytes} bytes over {self.mapped_bytes} mapped ones")
        return self._pool.backend.bytes_at(self._range, needed_bytes).view(dtype).view(shape)

    def release(self) -> None:
        """Give everything back, addresses included; nobody maps a lifted chunk any more. A second call changes nothing."""
        if not self._released:
            here = [place for place in range(len(self._chunks)) if place not in self._away]
            self._take_out(here)
            self._pool.free(self._owner, self._chunks)
            self._chunks, self._away = [], set()
            self._pool.backend.unreserve(self._range)
            self._released = True


def _runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """Places as (first, how many) of neighbours."""
    runs: list[tuple[int, int]] = []
    for place in sorted(places):
        first, n_chunks = runs[-1] if runs else (place, 0)
        if place == first + n_chunks and runs:
            runs[-1] = (first, n_chunks + 1)
        else:
            runs.append((place, 1))
    return runs
