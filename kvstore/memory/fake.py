"""Memory that is only counted: for tests of accounting, and for simulations of pools larger than this machine."""

from common.errors import OutOfChunks
from kvstore.memory.backend import Chunk, Range, VmMisuse
from kvstore.memory.mappings import MappingTable

_FIRST_ADDRESS = 1 << 40


class FakeBackend:
    """Follows every rule of VmBackend; its addresses must not be touched."""

    def __init__(self, capacity_bytes: int, granularity_bytes: int = 4096) -> None:
        self._capacity_bytes, self._granularity_bytes = capacity_bytes, granularity_bytes
        self._table = MappingTable(granularity_bytes)
        self._next_address, self._next_offset_bytes = _FIRST_ADDRESS, 0
        self.created_bytes = 0

    @property
    def granularity_bytes(self) -> int:
        """Smallest mappable unit."""
        return self._granularity_bytes

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
        if self.created_bytes + length_bytes > self._capacity_bytes:
            raise OutOfChunks(
                f"{self.created_bytes} of {self._capacity_bytes} bytes used; {length_bytes} more asked for"
            )
        chunk = Chunk(self._next_offset_bytes, length_bytes)
        self._next_offset_bytes += length_bytes
        self.created_bytes += length_bytes
        self._table.add_chunk(chunk)
        return chunk

    def release(self, chunk: Chunk) -> None:
        """Uncount a chunk."""
        self._table.drop_chunk(chunk)
        self.created_bytes -= chunk.length_bytes

    def map(self, where: Range, offset_bytes: int, chunk: Chunk) -> None:
        """Note the mapping."""
        self._table.add(where, offset_bytes, chunk)

    def unmap(self, where: Range, offset_bytes: int) -> Chunk:
        """Forget the mapping."""
        return self._table.remove(where, offset_bytes)

    def export_fd(self) -> int:
        """There is no memory to share: raises VmMisuse."""
        raise VmMisuse("counted memory cannot be shared with another process")

    def close(self) -> None:
        """Nothing is held."""
        self.created_bytes = 0
