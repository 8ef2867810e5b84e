"""The store's host memory: its whole budget, taken at start as one stretch of one memfd that workers map too."""

import ctypes
import mmap
import os
from collections.abc import Sequence

from common.errors import ConfigError, OutOfChunks
from common.units import MIB, format_bytes
from kvstore.memory.available import Available
from kvstore.memory.memfd import MemfdBackend
from kvstore.memory.shareable import PROBE_SLOT_BYTES, PROBE_SLOTS, MemoryKind, PagesInFile

MIN_BYTES = 2 * MIB


class BlockMemory:
    """One contiguous range of memory, numbered in pages once their length is known. Whoever made it closes it.

    Any thread may read and write pages that the core gave to it; `shape` and `close` are the loop's.
    """

    def __init__(self, budget_bytes: int, available: Available) -> None:
        """Takes `budget_bytes`, rounded down to the system's pages. Raises ConfigError with the numbers if it cannot."""
        if budget_bytes < MIN_BYTES:
            raise ConfigError(f"--host-memory={format_bytes(budget_bytes)}: must be {format_bytes(MIN_BYTES)} or more")
        if budget_bytes > available.n_bytes:
            raise ConfigError(
                f"--host-memory={format_bytes(budget_bytes)} is more than the {format_bytes(available.n_bytes)} that "
                f"are available ({available.limit}); set it lower, or free memory"
            )
        self.capacity_bytes = budget_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        self._backend = MemfdBackend(self.capacity_bytes, scratch_bytes=PROBE_SLOTS * PROBE_SLOT_BYTES)
        try:
            self._range = self._backend.reserve(self.capacity_bytes)
            self._chunk = self._backend.create(self.capacity_bytes)
        except OutOfChunks as error:
            self._backend.close()
            raise ConfigError(f"--host-memory={format_bytes(budget_bytes)}: {error}") from error
        self._backend.map_run(self._range, 0, [self._chunk])
        self._view = memoryview((ctypes.c_ubyte * self.capacity_bytes).from_address(self._range.address)).cast("B")
        self._pages_in_file: PagesInFile | None = None

    def shape(self, page_bytes: int, n_pages: int) -> None:
        """Number pages 0 to n_pages - 1 from the beginning; from now on others can map them."""
        assert n_pages * page_bytes <= self.capacity_bytes
        self._pages_in_file = PagesInFile(page_bytes, n_pages * page_bytes, (0,))

    # -- what a Share needs

    @property
    def pages_in_file(self) -> PagesInFile | None:
        """Where the pages lie; None before `shape`."""
        return self._pages_in_file

    @property
    def probe_offset_bytes(self) -> int:
        """Where scratch begins."""
        return self.capacity_bytes

    @property
    def kind(self) -> MemoryKind:
        """One file."""
        return "memfd"

    @property
    def device_uuid(self) -> str:
        """Host memory is of no device."""
        return ""

    def export_fds(self, first: int = 0, n_fds: int | None = None) -> list[int]:
        """A new descriptor of the memfd, which the caller closes."""
        return self._backend.export_fds()

    def read_scratch(self, offset_bytes: int, n_bytes: int) -> bytes:
        """What lies in a stretch of scratch now."""
        return os.pread(self._backend.fd, n_bytes, offset_bytes)

    def discard(self, offset_bytes: int, length_bytes: int) -> None:
        """Give back the memory of a stretch of scratch."""
        assert offset_bytes >= self.capacity_bytes
        self._backend.discard(offset_bytes, length_bytes)

    # -- pages

    def parts(self, pages: Sequence[int]) -> list[memoryview]:
        """The memory of these pages in their order, neighbours as one piece; not copied. Only between shape and close."""
        shape = self._pages_in_file
        assert shape is not None, "pages before their length was known"
        found: list[memoryview] = []
        first = at = 0
        while at < len(pages):
            at += 1
            if at == len(pages) or pages[at] != pages[at - 1] + 1:
                low, high = pages[first] * shape.page_bytes, (pages[at - 1] + 1) * shape.page_bytes
                found.append(self._view[low:high])
                first = at
        return found

    def write(self, pages: Sequence[int], block: bytes | bytearray | memoryview) -> None:
        """Copy a block into its pages."""
        rest = memoryview(block)
        for part in self.parts(pages):
            part[:] = rest[: len(part)]
            rest = rest[len(part) :]

    def read(self, pages: Sequence[int]) -> memoryview | bytes:
        """The bytes of a block, not copied if its pages are neighbours: to be used before they change."""
        parts = self.parts(pages)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Give all memory back; what others have mapped goes when they let go. Views must not be touched any more."""
        self._view.release()
        self._backend.unmap_run(self._range, 0, 1)
        self._backend.release(self._chunk)
        self._backend.unreserve(self._range)
        self._backend.close()
