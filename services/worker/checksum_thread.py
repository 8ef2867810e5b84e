"""The thread that reads pages and payloads for their checksums, so that the loop need not. It decides nothing."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from common.errors import PeerFailed
from common.net.sockets import Payload
from kvstore.transport.checksums import Checksums, checksums_of
from kvstore.transport.own_pages import OwnPages
from kvstore.transport.page_sums import page_sums
from services.worker.core.actions import LendChunks, ResizeMemory, TakeBackChunks


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages of our own, in this order."""

    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Payloads:
    """Whole pages in received or gathered frames, one after the other."""

    payloads: tuple[Payload, ...]


@dataclass(frozen=True, slots=True)
class ChecksumsMade:
    """The end of one job: every posted job has exactly one."""

    ticket: int
    checksums: Checksums
    problem: str = ""
    """Why there are none; empty: there are."""
    error: BaseException | None = None
    """Our own bug, which ended the thread."""


_PORTION_PAGES = 16
"""Read in one go: so long the loop may have to wait."""
_STOPPED = "the thread has stopped"
_GONE = "its pages have no memory any more"


@dataclass(slots=True, eq=False)
class _Job:
    ticket: int
    work: Pages | Payloads
    problem: str = ""
    """Why it must not be read, or not any further."""
    left: threading.Event = field(default_factory=threading.Event)
    """Its pages are not read any more."""


class ChecksumThread:
    """Owns a queue of jobs and does them in the order in which they were posted. All methods are the loop's thread's.

    `on_made` runs in this thread, or in that of the caller of `post`; it must only pass the news on.
    """

    def __init__(self, own: OwnPages, on_made: Callable[[ChecksumsMade], None], chunk_pages: int) -> None:
        """`own`: our pages, for this thread alone. `chunk_pages`: in one chunk of their memory."""
        self._own, self._on_made, self._chunk_pages = own, on_made, chunk_pages
        self._lock = threading.Condition()
        self._jobs: deque[_Job] = deque()  # this and the next under the lock
        self._current: _Job | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="checksums", daemon=True)
        self._thread.start()

    def post(self, ticket: int, work: Pages | Payloads) -> None:
        """Queue a job. After `stop` it ends without checksums at once."""
        with self._lock:
            if not self._stopping:
                self._jobs.append(_Job(ticket, work))
                self._lock.notify()
                return
        self._on_made(ChecksumsMade(ticket, (), _STOPPED))

    def leave(self, order: ResizeMemory | LendChunks | TakeBackChunks) -> None:
        """The order takes memory of pages: once this returns nothing reads those. Their jobs end without checksums.

        Nobody holds a page whose memory may go, so nobody wants to know its checksum any more. Waits for the rest of one
        portion, and only if that is of such a page: never for the queue.
        """
        with self._lock:
            doomed = [job for job in self._jobs if self._is_taken(job, order)]
            current = self._current
            if current is not None and self._is_taken(current, order):
                doomed.append(current)
            for job in doomed:
                job.problem = _GONE
        if current is not None and current.problem:
            current.left.wait()

    def _is_taken(self, job: _Job, order: ResizeMemory | LendChunks | TakeBackChunks) -> bool:
        pages = job.work.pages if isinstance(job.work, Pages) else ()
        match order:
            case ResizeMemory(n_pages=n_pages):
                return any(page >= n_pages for page in pages)
            case LendChunks(chunks=chunks):
                return not {page // self._chunk_pages for page in pages}.isdisjoint(chunks)
            case TakeBackChunks():
                return False  # these were left when they were lent

    def stop(self) -> None:
        """End after the portion in progress; jobs that are left end without checksums."""
        with self._lock:
            self._stopping = True
            self._lock.notify()
        self._thread.join()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                made = ChecksumsMade(job.ticket, self._read(job))
            except PeerFailed as error:
                made = ChecksumsMade(job.ticket, (), str(error))
            except BaseException as error:
                self._on_made(ChecksumsMade(job.ticket, (), str(error), error))
                raise
            finally:
                job.left.set()
            self._on_made(made)

    def _next(self) -> _Job | None:
        """None once there is nothing left to do or to refuse."""
        with self._lock:
            self._current = None
            while not self._jobs and not self._stopping:
                self._lock.wait()
            self._current = self._jobs.popleft() if self._jobs else None
            return self._current

    def _read(self, job: _Job) -> Checksums:
        """Raises PeerFailed for pages that are not there, or not any more."""
        if self._stopping:
            raise PeerFailed(_STOPPED)
        if isinstance(job.work, Payloads):
            page_bytes = self._own.layout.page_bytes
            return tuple(one for payload in job.work.payloads for one in page_sums(payload, page_bytes))
        sums, pages = list[int](), job.work.pages
        for low in range(0, len(pages), _PORTION_PAGES):
            if job.problem or self._stopping:
                raise PeerFailed(job.problem or _STOPPED)
            sums += checksums_of(self._own, pages[low : low + _PORTION_PAGES])
        return tuple(sums)
