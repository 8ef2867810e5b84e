"""What page memory must tell before other processes can map it. Knows no torch: a KV store shares memory too."""

from dataclasses import dataclass
from typing import Literal, Protocol

PROBE_SLOT_BYTES = 2 * 2**20
PROBE_SLOTS = 64
MemoryKind = Literal["memfd", "cuda"]


@dataclass(frozen=True, slots=True)
class PagesInFile:
    """Where pages lie in the memory that `Shareable.export_fds` hands out."""

    page_bytes: int
    chunk_bytes: int
    chunk_offsets: tuple[int, ...]
    """Where each chunk begins, in page order; all multiples of `page_bytes`."""
    generation: int = 0
    """Grows whenever chunks left. Who mapped an earlier generation may see other memory at pages that came back."""
    low_marks: tuple[tuple[int, int], ...] = ()
    """(generation, chunks that were left when it began), both rising. Who mapped an earlier generation has the first
    chunks still, as many as the first mark after it says; all others left meanwhile, even if as many are there again."""
    limit_chunks: int = 0
    """As many as there can ever be; 0: as many as there are."""


class Shareable(Protocol):
    """Page memory that others may map. Its owner may change what `pages_in_file` says; the share's thread reads it.

    Offsets count through the exported memory: the one file of kind "memfd", or, of kind "cuda", the exported chunks as
    if each lay right behind the one before it.
    """

    @property
    def kind(self) -> MemoryKind:
        """memfd: one file, to be mapped by mmap. cuda: one descriptor for each driver handle, to be imported."""
        ...

    @property
    def device_uuid(self) -> str:
        """Which device's memory it is, 32 hex digits; "" for host memory. Only a process on that device imports it."""
        ...

    @property
    def pages_in_file(self) -> PagesInFile | None:
        """None: the length of a page is not known yet."""
        ...

    @property
    def probe_offset_bytes(self) -> int:
        """Where PROBE_SLOTS slots of PROBE_SLOT_BYTES begin."""
        ...

    def export_fds(self, first: int = 0, n_fds: int | None = None) -> list[int]:
        """New descriptors, which the caller closes. memfd: the one file. cuda: each chunk in page order, then scratch.

        Of those `n_fds` from `first` on, as far as there are so many; as a slice, -1 being the last. None: all.
        """
        ...

    def read_scratch(self, offset_bytes: int, n_bytes: int) -> bytes:
        """What lies in a stretch of scratch now."""
        ...

    def discard(self, offset_bytes: int, length_bytes: int) -> None:
        """Make a stretch of scratch read as zeros; host memory is given back until it is written again."""
        ...
