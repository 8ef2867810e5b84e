"""The store's host memory: its whole budget, taken at start in chunks of one memfd, and read and written by slot."""

import ctypes
import mmap

from common.errors import ConfigError, OutOfChunks
from common.units import MIB, format_bytes
from kvstore.memory.available import Available
from kvstore.memory.chunks import ChunkPool
from kvstore.memory.memfd import MemfdBackend

CHUNK_BYTES = 2 * MIB
_OWNER = "kvstore"


class BlockMemory:
    """One contiguous range of memory. One thread uses it; whoever made it closes it."""

    def __init__(self, budget_bytes: int, available: Available) -> None:
        """Takes `budget_bytes`, rounded down to whole chunks. Raises ConfigError with the numbers if it cannot."""
        if budget_bytes < CHUNK_BYTES:
            raise ConfigError(
                f"--host-memory={format_bytes(budget_bytes)}: must be {format_bytes(CHUNK_BYTES)} or more"
            )
        if budget_bytes > available.n_bytes:
            raise ConfigError(
                f"--host-memory={format_bytes(budget_bytes)} is more than the {format_bytes(available.n_bytes)} that "
                f"are available ({available.limit}); set it lower, or free memory"
            )
        assert CHUNK_BYTES % mmap.PAGESIZE == 0
        n_chunks = budget_bytes // CHUNK_BYTES
        self.capacity_bytes = n_chunks * CHUNK_BYTES
        backend = MemfdBackend(self.capacity_bytes)
        self._pool = ChunkPool(backend, self.capacity_bytes, CHUNK_BYTES)
        self._range = backend.reserve(self.capacity_bytes)
        try:
            self._chunks = self._pool.alloc(_OWNER, n_chunks)
        except OutOfChunks as error:
            backend.close()
            raise ConfigError(f"--host-memory={format_bytes(budget_bytes)}: {error}") from error
        for number, chunk in enumerate(self._chunks):
            backend.map(self._range, number * CHUNK_BYTES, chunk)
        self._view = memoryview((ctypes.c_ubyte * self.capacity_bytes).from_address(self._range.address)).cast("B")

    def write(self, slot: int, block: bytes | bytearray | memoryview) -> None:
        """Copy a block to slot `slot` of slots of the block's length."""
        self._view[slot * len(block) : (slot + 1) * len(block)] = block

    def read(self, slot: int, block_bytes: int) -> memoryview:
        """The bytes of a slot, not copied: to be used before the next `write`."""
        return self._view[slot * block_bytes : (slot + 1) * block_bytes]

    def close(self) -> None:
        """Give all memory back. Views handed out before must not be touched any more."""
        self._view.release()
        for number in range(len(self._chunks)):
            self._pool.backend.unmap(self._range, number * CHUNK_BYTES)
        self._pool.free(_OWNER, self._chunks)
        self._pool.backend.unreserve(self._range)
        self._pool.close()
