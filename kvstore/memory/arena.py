"""The scratch of engine steps: one address range whose memory is borrowed, chunk by chunk, at its end.

Source: eLLM (arXiv 2506.15155), activations and KV over one physical pool; one arena in place of an allocator.
"""

from collections.abc import Sequence

from torch import Tensor

from kvstore.memory.backend import Chunk, VmBackend, VmMisuse


class ActivationArena:
    """Owns its address range and what is mapped there, never the chunks. Whoever calls holds the back end's lock."""

    def __init__(self, backend: VmBackend, chunk_bytes: int, capacity_chunks: int) -> None:
        """Reserve addresses; no memory yet. Raises ConfigError."""
        self._backend, self._chunk_bytes, self._capacity_chunks = backend, chunk_bytes, capacity_chunks
        self._range = backend.reserve(capacity_chunks * chunk_bytes)
        self._n_chunks = 0

    @property
    def n_chunks(self) -> int:
        """Chunks mapped."""
        return self._n_chunks

    @property
    def bytes(self) -> Tensor:
        """All that is mapped now, uint8, no copy. Who uses less of it may go on when the rest has left."""
        return self._backend.bytes_at(self._range, self._n_chunks * self._chunk_bytes)

    def grow(self, chunks: Sequence[Chunk]) -> None:
        """Map chunks behind the others. Raises OutOfChunks if the system bears no more mappings."""
        if self._n_chunks + len(chunks) > self._capacity_chunks:
            raise VmMisuse(f"arena: {self._n_chunks} + {len(chunks)} of {self._capacity_chunks} chunks")
        self._backend.map_run(self._range, self._n_chunks * self._chunk_bytes, chunks)
        self._n_chunks += len(chunks)

    def shrink(self, n_chunks: int) -> list[Chunk]:
        """Unmap the last chunks and return them. Raises OutOfChunks if the system bears too few mappings even for that.

        The caller guarantees that no step uses them.
        """
        if not 0 <= n_chunks <= self._n_chunks:
            raise VmMisuse(f"arena: cannot give back {n_chunks} of {self._n_chunks} chunks")
        kept = self._n_chunks - n_chunks
        leaving = self._backend.unmap_run(self._range, kept * self._chunk_bytes, n_chunks)
        self._n_chunks = kept
        return leaving

    def close(self) -> None:
        """Give the addresses back. Every view taken is invalid afterwards."""
        self.shrink(self._n_chunks)
        self._backend.unreserve(self._range)
