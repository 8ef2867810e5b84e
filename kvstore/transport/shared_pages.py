"""A peer's page memory, mapped into this process."""

import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.errors import PeerFailed
from common.ids import PeerId
from kvstore.transport.pages import Rows


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
        self._mapping = mmap.mmap(fd, file_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        page_bytes = description.page_bytes
        whole_bytes = file_bytes - file_bytes % page_bytes
        self._rows: Rows = np.frombuffer(self._mapping, np.uint8, whole_bytes).reshape(-1, page_bytes)
        self._row_of_page = _row_of_page(description)
        self.closed = False
        self.gib_per_s = 0.0
        """As measured by the probe."""

    @property
    def description(self) -> PoolDescription:
        """What the peer said of its memory."""
        return self._description

    @contextmanager
    def use(self) -> Iterator[Rows]:
        """All rows of the file, for as long as the block runs. Raises PeerFailed once closed."""
        with self._using:
            if self.closed:
                raise PeerFailed(f"the memory of {self._description.peer} is not mapped any more")
            yield self._rows

    def rows_of(self, pages: Sequence[int]) -> NDArray[np.int64]:
        """Which rows of the file hold these pages. Raises PeerFailed for pages that the peer did not share."""
        wanted = np.asarray(pages, np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < self._description.n_pages:
            raise PeerFailed(
                f"{self._description.peer} shares pages 0 to {self._description.n_pages - 1}; "
                f"{wanted.min()} to {wanted.max()} were asked for"
            )
        return self._row_of_page[wanted]

    def write_probe(self, pattern: bytes) -> None:
        """Write into this connection's scratch. Raises PeerFailed once closed."""
        with self._using:
            if self.closed:
                raise PeerFailed(f"the memory of {self._description.peer} is not mapped any more")
            first = self._description.probe_offset_bytes
            self._mapping[first : first + len(pattern)] = pattern

    def close(self) -> None:
        """Unmap. Nothing is written through this object afterwards. A second call changes nothing."""
        with self._using:
            if not self.closed:
                self.closed = True
                self._rows = np.empty((0, self._description.page_bytes), np.uint8)
                self._mapping.close()


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


def _row_of_page(description: PoolDescription) -> NDArray[np.int64]:
    per_chunk = description.chunk_bytes // description.page_bytes
    first_rows = np.asarray(description.chunk_offsets, np.int64) // description.page_bytes
    rows: NDArray[np.int64] = (first_rows[:, None] + np.arange(per_chunk)).reshape(-1)
    return rows
