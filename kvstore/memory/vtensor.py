"""One contiguous address range whose memory comes and goes in chunks at its end."""

import torch
from torch import Tensor

from common.errors import OutOfChunks
from kvstore.memory.backend import Chunk, VmMisuse
from kvstore.memory.chunks import ChunkPool


class VirtualTensor:
    """Owns its address range and the chunks mapped there. One thread uses it.

    Chunk i is always mapped at i * chunk_bytes, so an address stays valid while its chunk is mapped, however much the
    range grows. Source: vTensor (arXiv 2407.15309).
    """

    def __init__(self, pool: ChunkPool, capacity_bytes: int, *, owner: str) -> None:
        """Reserve addresses for `capacity_bytes`, rounded up to whole chunks; no memory yet. Raises ConfigError."""
        self._pool, self._owner = pool, owner
        self._capacity_chunks = -(-capacity_bytes // pool.chunk_bytes)
        self._range = pool.backend.reserve(self._capacity_chunks * pool.chunk_bytes)
        self._chunks: list[Chunk] = []
        self._released = False

    @property
    def address(self) -> int:
        """Where the range begins."""
        return self._range.address

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """What is mapped, in address order."""
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
        leaving = self._pool.backend.unmap_run(self._range, kept * self._pool.chunk_bytes, n_chunks)
        self._pool.free(self._owner, leaving)
        del self._chunks[kept:]

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
        """Give everything back, addresses included. A second call changes nothing."""
        if not self._released:
            self.shrink(len(self._chunks))
            self._pool.backend.unreserve(self._range)
            self._released = True
