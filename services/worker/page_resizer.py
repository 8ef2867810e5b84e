"""Changes the page memory while the worker serves, a small portion in each turn of its loop.

When all is done the engine gets the new view, peers are told what they may map, and the inbox hears of it once they have
followed. Which pages may go, the core has decided: nobody uses them.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from torch import Tensor

from common.errors import OutOfChunks
from common.units import MIB
from kvstore.memory.page_pool import PagePool
from services.worker.inbox import Events, MemoryChanged

_PORTION_BYTES = {"cpu": 8 * MIB, "cuda": 1024 * MIB}
"""What takes a few milliseconds: the host's memory is cleared page by page, a device's is mapped in large chunks."""


class ResizableMemory(Protocol):
    """What of a PageMemory is needed here."""

    @property
    def pages(self) -> PagePool:
        """The pool as it is."""
        ...

    def chunks_for(self, n_pages: int) -> int:
        """The fewest chunks that hold pages 0 to n_pages - 1."""
        ...

    def require_room(self, n_chunks: int) -> None:
        """Raise OutOfChunks unless there could be so many."""
        ...

    def settle(self) -> None:
        """Wait for what runs on the device."""
        ...

    def resize(self, n_chunks: int, *, settled: bool = False) -> int:
        """Grow or shrink; returns how many pages there are then. Raises OutOfChunks."""
        ...


class PageResizer:
    """Used by the loop's thread, which opened the memory. One order at a time, as the core gives them."""

    def __init__(
        self,
        memory: ResizableMemory,
        inbox: Events,
        *,
        use_pages: Callable[[Tensor], None],
        tell_peers: Callable[[Callable[[], None]], None],
    ) -> None:
        """`use_pages`: gives the engine a view. `tell_peers(then)`: lets them follow, and calls `then` from any thread."""
        self._memory, self._inbox = memory, inbox
        self._use_pages, self._tell_peers = use_pages, tell_peers
        self._goal_chunks: int | None = None
        self._settling: Future[None] | None = None
        pages = memory.pages
        self._portion_chunks = max(1, _PORTION_BYTES[pages.device.type] // pages.chunk_bytes)

    @property
    def busy(self) -> bool:
        """Whether there is something to do in the next turn."""
        return self._goal_chunks is not None and (self._settling is None or self._settling.done())

    def order(self, n_pages: int) -> None:
        """Have memory for so many pages; the inbox gets MemoryChanged."""
        assert self._goal_chunks is None, "the core orders one change at a time"
        goal, here = self._memory.chunks_for(n_pages), self._n_chunks
        if goal < here:
            self._settling = self._settle()
        else:
            try:
                self._memory.require_room(goal)  # all of it, before any of it is taken
            except OutOfChunks as error:
                self._inbox.put(MemoryChanged(self._memory.pages.n_pages, str(error)))
                return
        self._goal_chunks = goal

    def turn(self) -> None:
        """Do the next portion of what was ordered, if anything is left of it."""
        if self._goal_chunks is None or not self.busy:
            return
        if self._settling is not None:
            self._settling.result()  # a device that failed ends the worker
            self._settling = None
        change, problem = self._goal_chunks - self._n_chunks, ""
        portion = max(-self._portion_chunks, min(self._portion_chunks, change))
        try:
            self._memory.resize(self._n_chunks + portion, settled=True)
        except OutOfChunks as error:  # others took it meanwhile: what was reached stays
            problem = str(error)
        if problem or self._n_chunks == self._goal_chunks:
            self._finish(problem)

    def _settle(self) -> Future[None] | None:
        """Wait for a device beside the loop, which goes on keeping it busy: what is started now uses no page that goes."""
        if self._memory.pages.device.type == "cpu":
            return None
        waiter = ThreadPoolExecutor(1, thread_name_prefix="settle")
        settling = waiter.submit(self._memory.settle)
        waiter.shutdown(wait=False)
        return settling

    def _finish(self, problem: str) -> None:
        self._goal_chunks = None
        self._use_pages(self._memory.pages.tensor)
        news = MemoryChanged(self._memory.pages.n_pages, problem)
        self._tell_peers(lambda: self._inbox.put(news))

    @property
    def _n_chunks(self) -> int:
        return self._memory.chunks_for(self._memory.pages.n_pages)
