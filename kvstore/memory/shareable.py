"""What page memory must tell before other processes can map it. Knows no torch: a KV store shares memory too."""

from dataclasses import dataclass
from typing import Protocol

PROBE_SLOT_BYTES = 2 * 2**20
PROBE_SLOTS = 64


@dataclass(frozen=True, slots=True)
class PagesInFile:
    """Where pages lie in the shared file."""

    page_bytes: int
    chunk_bytes: int
    chunk_offsets: tuple[int, ...]
    """Where each chunk begins, in page order; all multiples of `page_bytes`."""


class Shareable(Protocol):
    """Page memory in one file. Its owner may change what `pages_in_file` says; the share's thread reads it."""

    @property
    def pages_in_file(self) -> PagesInFile | None:
        """None: the length of a page is not known yet."""
        ...

    @property
    def probe_offset_bytes(self) -> int:
        """Where PROBE_SLOTS slots of PROBE_SLOT_BYTES begin; they cost nothing until a peer writes there."""
        ...

    def export_fd(self) -> int:
        """Descriptor of the file; stays the memory's."""
        ...

    def discard(self, offset_bytes: int, length_bytes: int) -> None:
        """Give back the memory of a stretch of scratch; it reads as zeros afterwards."""
        ...
