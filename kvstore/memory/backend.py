"""What the pool needs of virtual memory: address ranges without memory, physical chunks, and mappings between them."""

from dataclasses import dataclass
from typing import Protocol


class VmMisuse(RuntimeError):
    """A call that would corrupt somebody's memory: overlap, misalignment, not mapped, still mapped. Our own bug."""


@dataclass(frozen=True, slots=True)
class Range:
    """Reserved addresses. Touching a part that has no chunk mapped is a fault."""

    address: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Physical memory, named by its place in the file that `export_fd` shares."""

    offset_bytes: int
    length_bytes: int


class VmBackend(Protocol):
    """One kind of memory. All lengths and offsets are multiples of `granularity_bytes`, else VmMisuse.

    Used by one thread. Every implementation passes the same tests.
    """

    @property
    def granularity_bytes(self) -> int:
        """Smallest mappable unit."""
        ...

    def reserve(self, length_bytes: int) -> Range:
        """Take an address range without memory. Raises ConfigError if the address space does not give it."""
        ...

    def unreserve(self, where: Range) -> None:
        """Give the addresses back. Raises VmMisuse while anything is mapped there."""
        ...

    def create(self, length_bytes: int) -> Chunk:
        """Physical memory, not mapped anywhere. Raises OutOfChunks."""
        ...

    def release(self, chunk: Chunk) -> None:
        """Give physical memory back to the system. Raises VmMisuse while it is mapped."""
        ...

    def map(self, where: Range, offset_bytes: int, chunk: Chunk) -> None:
        """Make `chunk` readable and writable at `offset_bytes` of the range. Its contents stay."""
        ...

    def unmap(self, where: Range, offset_bytes: int) -> Chunk:
        """Undo one `map` and return its chunk. The caller guarantees that nothing uses those addresses any more."""
        ...

    def export_fd(self) -> int:
        """Descriptor of the file that chunks are parts of; stays open as long as the backend."""
        ...

    def close(self) -> None:
        """Release everything, mapped or not. Addresses handed out before are invalid afterwards."""
        ...
