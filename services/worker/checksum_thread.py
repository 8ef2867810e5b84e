"""The thread that reads pages and payloads for their checksums, so that the loop need not. It decides nothing."""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from common.errors import PeerFailed
from common.net.sockets import Payload
from kvstore.transport.checksums import Checksums, checksums_of, payload_checksums
from kvstore.transport.own_pages import OwnPages


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


_Item = tuple[int, Pages | Payloads] | threading.Event | None


class ChecksumThread:
    """Owns a queue of jobs and does them in the order in which they were posted. All methods are the loop's thread's.

    `on_made` runs in this thread, or in that of the caller of `post`; it must only pass the news on.
    """

    def __init__(self, own: OwnPages, on_made: Callable[[ChecksumsMade], None]) -> None:
        """`own`: our pages, for this thread alone."""
        self._own, self._on_made = own, on_made
        self._queue: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="checksums", daemon=True)
        self._thread.start()

    def post(self, ticket: int, work: Pages | Payloads) -> None:
        """Queue a job. After `stop` it ends without checksums at once."""
        if self._stopping:
            self._on_made(ChecksumsMade(ticket, (), "the thread has stopped"))
        else:
            self._queue.put((ticket, work))

    def drain(self, within_s: float = 10.0) -> None:
        """Wait until what was posted so far is read: the memory of its pages may go."""
        reached = threading.Event()
        self._queue.put(reached)
        while not reached.wait(0.05) and self._thread.is_alive() and within_s > 0:
            within_s -= 0.05

    def stop(self) -> None:
        """End after the job in progress; those that are left end without checksums."""
        self._stopping = True
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            ticket, work = item
            if self._stopping:
                self._on_made(ChecksumsMade(ticket, (), "the thread has stopped"))
                continue
            try:
                made = ChecksumsMade(ticket, self._read(work))
            except PeerFailed as error:
                made = ChecksumsMade(ticket, (), str(error))
            except BaseException as error:
                self._on_made(ChecksumsMade(ticket, (), str(error), error))
                raise
            self._on_made(made)

    def _read(self, work: Pages | Payloads) -> Checksums:
        if isinstance(work, Pages):
            return checksums_of(self._own, work.pages)
        page_bytes = self._own.layout.page_bytes
        return tuple(one for payload in work.payloads for one in payload_checksums(payload, page_bytes))
