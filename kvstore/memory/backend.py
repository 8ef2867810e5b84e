"""What the pool needs of virtual memory: address ranges without memory, physical chunks, and mappings between them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # a KV store shares host memory and runs without torch
    import torch


class VmMisuse(RuntimeError):
    """A call that would corrupt somebody's memory: overlap, misalignment, not mapped, still mapped. Our own bug."""


class HalfMoved(RuntimeError):
    """Chunks were to move, could not, and could not go back either. Nobody can use this memory safely: the process ends."""


@dataclass(frozen=True, slots=True)
class Range:
    """Reserved addresses. Touching a part that has no chunk mapped is a fault."""

    address: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Physical memory. Where all chunks share one file, `offset_bytes` is its place there; else it is only a name."""

    offset_bytes: int
    length_bytes: int


class VmBackend(Protocol):
    """One kind of memory. All lengths and offsets are multiples of `granularity_bytes`, else VmMisuse.

    Used by one thread at a time: where several share one (views, lending, resizing), each call is made under their lock.
    `export_fds` may be called at any time. Every implementation passes the same tests.
    """

    @property
    def device(self) -> "torch.device":
        """Whose memory it is."""
        ...

    @property
    def granularity_bytes(self) -> int:
        """Smallest mappable unit."""
        ...

    @property
    def live_mappings(self) -> int:
        """Mappings that exist, counted as what limits them counts: a chunk that is mapped twice is two."""
        ...

    @property
    def max_mappings(self) -> int:
        """How many there may be. Who maps for convenience stops before; who must, finds out by OutOfChunks."""
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

    def create_run(self, length_bytes: int, n_chunks: int) -> list[Chunk]:
        """`create`, `n_chunks` times: all of them, or OutOfChunks and none. The dearest part is done at once, where it
        can be."""
        ...

    def release(self, chunk: Chunk) -> None:
        """Give physical memory back to the system. Raises VmMisuse while it is mapped."""
        ...

    def map_run(self, where: Range, offset_bytes: int, chunks: Sequence[Chunk]) -> None:
        """Make chunks readable and writable one behind the other from `offset_bytes` on: all of them, or none.

        A chunk may be mapped at many places, and is the same memory at each. Their contents stay; what a new chunk holds
        is the back end's affair. Raises OutOfChunks if the system has no room for so many mappings.
        """
        ...

    def unmap_run(self, where: Range, offset_bytes: int, n_chunks: int) -> list[Chunk]:
        """Undo the mappings of `n_chunks` chunks from `offset_bytes` on and return the chunks: all of them, or none.

        The caller guarantees that nothing uses those addresses any more. Raises OutOfChunks if the system bears too few
        mappings to divide one; a whole stretch between holes can always go.
        """
        ...

    def keep_for_undoing(self, n_mappings: int) -> None:
        """Before an order of several calls that adds so many mappings at the most: have what may be needed to undo it.

        Raises OutOfChunks if the system has not so many; then the order must not begin.
        """
        ...

    def undoing(self) -> AbstractContextManager[None]:
        """Around calls that undo what was done of an order before it failed: they may use all that is kept for that."""
        ...

    def export_fds(self, chunks: Sequence[Chunk]) -> list[int]:
        """New descriptors through which another process can map these chunks; the caller closes them.

        One for each chunk, or a single one if all memory is one file.
        """
        ...

    def bytes_at(self, where: Range, n_bytes: int) -> "torch.Tensor":
        """The beginning of a range as uint8 on `device`, not copied.

        It may reach over parts that are not mapped yet; those must not be touched.
        """
        ...

    def close(self) -> None:
        """Release everything, mapped or not. Addresses handed out before are invalid afterwards."""
        ...
