"""A peer's page memory, mapped into this process."""

import fcntl
import mmap
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.errors import PeerFailed
from common.log import Log
from kvstore.memory.shareable import PROBE_SLOT_BYTES
from kvstore.transport.descriptions import Description, PoolDescription
from kvstore.transport.pages import Ids, Rows, as_ids, as_range, copy_pages
from kvstore.transport.refusals import refusals
from kvstore.transport.uses import Uses

_ROUNDS = 8
_MOST_PAGES = 2**28
"""What is kept for each here takes 2 GiB then."""


class Pinning(Protocol):
    """A stretch of the mapping that a device's copy engines may use, until `end`."""

    def end(self) -> None:
        """Let go of the stretch, which stays mapped. No copy is in progress."""
        ...


class SharedPages:
    """Keeps the mapping until `close`, which waits for the uses in progress. Any thread may call.

    Uses do not wait for each other: a hand-over and a spill may run side by side.

    The peer's death does not touch the mapping: the kernel keeps the memory while anybody maps it.
    """

    kind = "shm"
    missing_chunks = 0
    """All of the file is mapped from the beginning."""

    def __init__(self, description: PoolDescription, fd: int) -> None:
        """Maps the file and leaves `fd` to the caller. Raises PeerFailed if file and description disagree."""
        _require_sealed(description, fd)
        file_bytes = os.fstat(fd).st_size
        _require_consistent(description, file_bytes)
        self._uses = Uses(f"the memory of {description.peer}")
        self._file_bytes = file_bytes
        mapping = mmap.mmap(fd, file_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        page_bytes = description.page_bytes
        # The array keeps the mapping alive, so the memory is unmapped when the last view of it goes, never before.
        self._bytes: NDArray[np.uint8] = np.frombuffer(mapping, np.uint8)
        self._rows: Rows = self._bytes[: file_bytes - file_bytes % page_bytes].reshape(-1, page_bytes)
        self._pinning: Pinning | None = None
        self._make_pinning: Callable[[SharedPages], Pinning] | None = None
        self._may_pin = False
        self._pin_lock = threading.Lock()  # one at a time pins
        self._describe(description)
        self.gib_per_s = 0.0
        """As measured by the probe."""

    def _describe(self, description: PoolDescription) -> None:
        self._description = description
        self._row_of_page = _row_of_page(description)
        self._n_pages = description.n_pages
        self._shift = _shift(self._row_of_page)

    @property
    def description(self) -> PoolDescription:
        """What the peer said of its memory, last."""
        return self._description

    @property
    def closed(self) -> bool:
        """Whether it is unmapped, or about to be."""
        return self._uses.closed

    def write(self, target_pages: Ids, source: Rows, source_pages: Ids) -> int:
        """Copy local pages into the peer's; returns how many contiguous pieces those were.

        Raises PeerFailed once closed, and for pages that do not exist.
        """
        with self.using() as rows:
            try:
                return copy_pages(source, source_pages, rows, self.rows_for(target_pages))
            except IndexError as error:
                raise PeerFailed(str(error)) from error

    def read_into(self, target: Rows, target_pages: Ids, pages: Ids) -> int:
        """Copy the peer's `pages` into local ones; returns how many contiguous pieces those were.

        Raises PeerFailed once closed, and for pages that do not exist.
        """
        with self.using() as rows:
            try:
                return copy_pages(rows, self.rows_for(pages), target, target_pages)
            except IndexError as error:
                raise PeerFailed(str(error)) from error

    def read(self, pages: Ids) -> Rows:
        """A copy of these pages as they are now. Raises PeerFailed once closed, and for pages that do not exist."""
        copied = np.empty((len(pages), self._description.page_bytes), np.uint8)
        self.read_into(copied, range(len(pages)), pages)
        return copied

    def rows_for(self, pages: Ids) -> Ids:
        """Where the peer's pages lie in the mapping; good inside of one use. Raises PeerFailed for pages not there."""
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
        """The mapped rows, which stay mapped inside. Several threads may be inside at once; not to be nested.

        Raises PeerFailed once closed.
        """
        with self._uses.inside():
            yield self._rows

    @property
    def pinning(self) -> Pinning | None:
        """What `pin` was given, if that is in force still; good inside of one use."""
        return self._pinning

    def pin(self, make: "Callable[[SharedPages], Pinning]") -> None:
        """Keep what `make` pins until the mapping changes or is closed, then end it. Not inside of a use.

        `renew_pinning` pins anew after changes. Raises PeerFailed, as `make` does, with nothing pinned.
        """
        self._make_pinning = make
        self._pin(make)
        self._may_pin = True

    def renew_pinning(self) -> None:
        """Before a use: pin anew what was pinned before it changed. Where that fails, uses go on without until it changes."""
        make = self._make_pinning
        if make is None or self._pinning is not None or not self._may_pin:
            return
        try:
            self._pin(make)
        except PeerFailed as error:
            self._may_pin = False
            if not self.closed:
                Log(process=self._description.peer).event("not_pinned_again", text=str(error))

    def _pin(self, make: "Callable[[SharedPages], Pinning]") -> None:
        with self._pin_lock:
            if self._pinning is not None:
                return
            description, made, kept = self._description, make(self), False
            try:
                with self._uses.alone():
                    if description is self._description:
                        self._pinning, kept = made, True
            finally:
                if not kept:
                    made.end()  # closed, or changed meanwhile, which the next use makes up for

    def _unpin(self) -> None:
        if self._pinning is not None:
            self._pinning.end()
            self._pinning = None

    def add_chunks(self, fds: Sequence[int]) -> None:
        """There is only the file. Raises PeerFailed."""
        raise PeerFailed(f"{self._description.peer} sent {len(fds)} chunks although its pages lie in a file")

    def redescribe(self, description: Description) -> None:
        """The pool has changed. Pages are found by the new description; a pinning ends. Raises PeerFailed."""
        if not isinstance(description, PoolDescription) or description.page_bytes != self._description.page_bytes:
            raise PeerFailed(f"{self._description.peer} describes another kind of memory than before")
        _require_consistent(description, self._file_bytes)
        with self._uses.alone(), refusals("let go of"):
            self._unpin()  # the kernel keeps pinned memory, also if the host gave it back
            self._describe(description)
            self._may_pin = self._make_pinning is not None

    def write_probe(self, pattern: bytes) -> None:
        """Write into this connection's scratch. Raises PeerFailed once closed."""
        with self._uses.inside():
            first = self._description.probe_offset_bytes
            self._bytes[first : first + len(pattern)] = np.frombuffer(pattern, np.uint8)

    def measure_gib_per_s(self) -> float:
        """How fast its scratch is written. Raises PeerFailed once closed."""
        pattern = secrets.token_bytes(self._description.probe_bytes)
        began_s = time.perf_counter()
        for _ in range(_ROUNDS):
            self.write_probe(pattern)
        return _ROUNDS * len(pattern) / max(time.perf_counter() - began_s, 1e-9) / 2**30

    def close(self) -> None:
        """Unmap, after the uses in progress. Nothing is written through this object afterwards."""
        self._uses.close()
        self._unpin()
        self._bytes = np.empty(0, np.uint8)
        self._rows = self._bytes.reshape(0, self._description.page_bytes)


def _require_sealed(description: PoolDescription, fd: int) -> None:
    """Raise PeerFailed for a file that could be cut short under our mapping: whoever touched it then would be killed."""
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    except OSError as error:  # no memory file at all
        raise PeerFailed(f"{description.peer} handed out what is no memory: {error}") from error
    if not sealed:
        raise PeerFailed(f"{description.peer} handed out a file that could be cut short under whoever maps it")


def _require_consistent(description: PoolDescription, file_bytes: int) -> None:
    ends = [*description.chunk_offsets, 0]
    whole = description.page_bytes > 0 and description.chunk_bytes > 0
    fits = whole and description.chunk_bytes % description.page_bytes == 0 and description.n_pages <= _MOST_PAGES
    inside = min(ends) >= 0 and max(ends) + description.chunk_bytes <= file_bytes
    probe_inside = 0 <= description.probe_offset_bytes <= file_bytes - description.probe_bytes
    probe_inside = probe_inside and 0 <= description.probe_bytes <= PROBE_SLOT_BYTES
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
