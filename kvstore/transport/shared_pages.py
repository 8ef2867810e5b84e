"""A peer's page memory, mapped into this process."""

import mmap
import os
import threading
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.errors import PeerFailed
from common.ids import PeerId
from kvstore.transport.pages import Rows, copy_pages, run_start


class PoolDescription(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Where pages lie in a shared file, told with its descriptor. A pool that changes is described anew."""

    peer: PeerId
    """Whose memory this is; carries the incarnation."""
    page_bytes: int
    chunk_bytes: int
    chunk_offsets: tuple[int, ...]
    """Where each chunk begins, in page order; all multiples of `page_bytes`."""
    probe_offset_bytes: int
    probe_bytes: int
    """Scratch for the probe of this connection."""

    @property
    def n_pages(self) -> int:
        """Pages that can be written."""
        return len(self.chunk_offsets) * (self.chunk_bytes // self.page_bytes)


class SharedPages:
    """Keeps the mapping until `close`, which waits for a use in progress. Any thread may call.

    The peer's death does not touch the mapping: the kernel keeps the memory while anybody maps it.
    """

    def __init__(self, description: PoolDescription, fd: int) -> None:
        """Maps the file and leaves `fd` to the caller. Raises PeerFailed if file and description disagree."""
        file_bytes = os.fstat(fd).st_size
        _require_consistent(description, file_bytes)
        self._description = description
        self._using = threading.Lock()
        mapping = mmap.mmap(fd, file_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        page_bytes = description.page_bytes
        # The array keeps the mapping alive, so the memory is unmapped when the last view of it goes, never before.
        self._bytes: NDArray[np.uint8] = np.frombuffer(mapping, np.uint8)
        self._rows: Rows = self._bytes[: file_bytes - file_bytes % page_bytes].reshape(-1, page_bytes)
        self._row_of_page = _row_of_page(description)
        self._n_pages = description.n_pages
        self._shift = _shift(self._row_of_page)
        self.closed = False
        self.gib_per_s = 0.0
        """As measured by the probe."""

    @property
    def description(self) -> PoolDescription:
        """What the peer said of its memory."""
        return self._description

    def write(self, target_pages: Sequence[int], source: Rows, source_pages: Sequence[int]) -> None:
        """Copy local pages into the peer's. Raises PeerFailed once closed, and for pages that do not exist."""
        place = run_start(target_pages)
        if self._shift is not None and place is not None:
            low, high = place, target_pages[-1]
        else:
            low, high = min(target_pages, default=0), max(target_pages, default=0)
        if low < 0 or (target_pages and high >= self._n_pages):
            raise PeerFailed(
                f"{self._description.peer} shares pages 0 to {self._n_pages - 1}; {low} to {high} were asked for"
            )
        with self._using:
            rows = self._mapped_rows()
            try:
                if self._shift is not None and place is not None:
                    first = place + self._shift
                    copy_pages(source, source_pages, rows, range(first, first + len(target_pages)))
                else:
                    copy_pages(
                        source, source_pages, rows, self._row_of_page[np.asarray(target_pages, np.int64)].tolist()
                    )
            except IndexError as error:
                raise PeerFailed(str(error)) from error

    def read(self, pages: Sequence[int]) -> Rows:
        """A copy of these pages as they are now. Raises PeerFailed once closed."""
        with self._using:
            return self._mapped_rows()[self._row_of_page[np.asarray(pages, np.int64)]]

    def _mapped_rows(self) -> Rows:
        if self.closed:
            raise PeerFailed(f"the memory of {self._description.peer} is not mapped any more")
        return self._rows

    def write_probe(self, pattern: bytes) -> None:
        """Write into this connection's scratch. Raises PeerFailed once closed."""
        with self._using:
            self._mapped_rows()
            first = self._description.probe_offset_bytes
            self._bytes[first : first + len(pattern)] = np.frombuffer(pattern, np.uint8)

    def close(self) -> None:
        """Unmap, after the use in progress. Nothing is written through this object afterwards."""
        with self._using:
            self.closed = True
            self._bytes = np.empty(0, np.uint8)
            self._rows = self._bytes.reshape(0, self._description.page_bytes)


def _require_consistent(description: PoolDescription, file_bytes: int) -> None:
    ends = [*description.chunk_offsets, 0]
    fits = description.page_bytes > 0 and description.chunk_bytes % description.page_bytes == 0
    inside = min(ends) >= 0 and max(ends) + description.chunk_bytes <= file_bytes
    probe_inside = 0 <= description.probe_offset_bytes <= file_bytes - description.probe_bytes
    if not (fits and inside and probe_inside) or any(start % description.page_bytes for start in ends):
        raise PeerFailed(
            f"{description.peer} describes {len(description.chunk_offsets)} chunks of {description.chunk_bytes} bytes and "
            f"pages of {description.page_bytes} that do not fit its file of {file_bytes} bytes"
        )


def _shift(row_of_page: NDArray[np.int64]) -> int | None:
    """Row less page, if that is the same for every page: the rule while a pool has only grown."""
    shifts = row_of_page - np.arange(len(row_of_page))
    return int(shifts[0]) if len(shifts) and (shifts == shifts[0]).all() else None


def _row_of_page(description: PoolDescription) -> NDArray[np.int64]:
    per_chunk = description.chunk_bytes // description.page_bytes
    first_rows = np.asarray(description.chunk_offsets, np.int64) // description.page_bytes
    rows: NDArray[np.int64] = (first_rows[:, None] + np.arange(per_chunk)).reshape(-1)
    return rows
