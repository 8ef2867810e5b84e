"""A peer's page memory, mapped into this process."""

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.errors import PeerFailed
from common.ids import PeerId
from kvstore.transport.pages import Ids, Rows, as_ids, as_range, copy_pages


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
    """Keeps the mapping until `close`, which waits for the uses in progress. Any thread may call.

    Uses do not wait for each other: a hand-over and a spill may run side by side.

    The peer's death does not touch the mapping: the kernel keeps the memory while anybody maps it.
    """

    def __init__(self, description: PoolDescription, fd: int) -> None:
        """Maps the file and leaves `fd` to the caller. Raises PeerFailed if file and description disagree."""
        file_bytes = os.fstat(fd).st_size
        _require_consistent(description, file_bytes)
        self._description = description
        self._lock = threading.Lock()  # guards what says who is inside
        self._users = 0
        self._unused = threading.Event()  # closed, and nobody is inside
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

    def write(self, target_pages: Ids, source: Rows, source_pages: Ids) -> int:
        """Copy local pages into the peer's; returns how many contiguous pieces those were.

        Raises PeerFailed once closed, and for pages that do not exist.
        """
        places = self._rows_for(target_pages)
        rows = self._enter()
        try:
            return copy_pages(source, source_pages, rows, places)
        except IndexError as error:
            raise PeerFailed(str(error)) from error
        finally:
            self._leave()

    def read_into(self, target: Rows, target_pages: Ids, pages: Ids) -> int:
        """Copy the peer's `pages` into local ones; returns how many contiguous pieces those were.

        Raises PeerFailed once closed, and for pages that do not exist.
        """
        places = self._rows_for(pages)
        rows = self._enter()
        try:
            return copy_pages(rows, places, target, target_pages)
        except IndexError as error:
            raise PeerFailed(str(error)) from error
        finally:
            self._leave()

    def read(self, pages: Ids) -> Rows:
        """A copy of these pages as they are now. Raises PeerFailed once closed, and for pages that do not exist."""
        copied = np.empty((len(pages), self._description.page_bytes), np.uint8)
        self.read_into(copied, range(len(pages)), pages)
        return copied

    def _rows_for(self, pages: Ids) -> Ids:
        """Where the peer's pages lie in the mapping. Raises PeerFailed for pages that do not exist."""
        found = as_range(pages)
        if found is not None:
            self._require(found[0], found[-1])
            if self._shift is not None:
                return range(found.start + self._shift, found.stop + self._shift, found.step)
        ids = as_ids(pages)
        if found is None and ids.size:
            self._require(int(ids.min()), int(ids.max()))
        if self._shift is not None:
            return ids + self._shift
        rows: NDArray[np.int64] = self._row_of_page[ids]
        return rows

    def _require(self, low: int, high: int) -> None:
        if low < 0 or high >= self._n_pages:
            raise PeerFailed(
                f"{self._description.peer} shares pages 0 to {self._n_pages - 1}; {low} to {high} were asked for"
            )

    @contextmanager
    def using(self) -> Iterator[Rows]:
        """The mapped rows, which stay mapped inside. Several threads may be inside at once."""
        rows = self._enter()
        try:
            yield rows
        finally:
            self._leave()

    def _enter(self) -> Rows:
        with self._lock:
            if self.closed:
                raise PeerFailed(f"the memory of {self._description.peer} is not mapped any more")
            self._users += 1
            return self._rows

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self.closed and self._users == 0:
                self._unused.set()

    def write_probe(self, pattern: bytes) -> None:
        """Write into this connection's scratch. Raises PeerFailed once closed."""
        with self.using():
            first = self._description.probe_offset_bytes
            self._bytes[first : first + len(pattern)] = np.frombuffer(pattern, np.uint8)

    def close(self) -> None:
        """Unmap, after the uses in progress. Nothing is written through this object afterwards."""
        with self._lock:
            self.closed = True
            if self._users == 0:
                self._unused.set()
        self._unused.wait()
        with self._lock:
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
