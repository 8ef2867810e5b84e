"""How large this worker's pool of pages is, and how large it shall be. Pure.

An operator gives a size. Growing: memory first, and new pages are handed out when everybody who maps our memory has
them. Shrinking: pages that nobody holds leave the pool at once, their memory follows, and what is still held follows
when it is released, without being asked for again. One change of memory is under way at a time.
"""

from dataclasses import dataclass

from common.ids import PeerId
from common.messages.actions import Send
from common.messages.resizing import Resize, ResizeAnswer
from common.units import format_bytes
from kvstore.index.block_pool import BlockPool
from services.worker.core.actions import Action, ResizeMemory
from services.worker.core.spare_memory import SpareMemory


@dataclass(frozen=True, slots=True)
class PoolSize:
    """The memory that a pool starts with."""

    n_pages: int
    chunk_pages: int = 1
    """Memory comes and goes in runs of so many pages."""
    page_bytes: int = 1
    host_pages: int = 0
    """Pages of the host buffer, if there is one."""


class Resizing:
    """Owns the target, what memory there is, and who waits for an answer. The pages themselves are the pool's."""

    def __init__(
        self, pool: BlockPool, size: PoolSize, *, worker: str, block_tokens: int, spare: SpareMemory | None = None
    ) -> None:
        """`worker`: its name, for texts. `spare`: fetches chunks that the system has before the size changes."""
        self._spare = spare
        self._pool, self._chunk_pages, self._page_bytes = pool, size.chunk_pages, size.page_bytes
        self._worker, self._block_tokens = worker, block_tokens
        self._memory_pages = self._target_pages = size.n_pages
        self._ordered = False
        self._asked: list[tuple[PeerId, int]] = []
        self._problem = ""
        self.has_shrunk = False
        """Whether requests that were accepted may be too large for the pool by now."""

    @property
    def memory_pages(self) -> int:
        """Pages that there is memory for, as of the last change that has ended."""
        return self._memory_pages

    @property
    def page_bytes(self) -> int:
        """Of one page."""
        return self._page_bytes

    def ask(self, asker: PeerId, message: Resize) -> list[Action]:
        """An operator's word. The answer goes to `asker` when all that can be done at once is done.

        Whoever still waits for another size is told that this one came after it.
        """
        pages = message.device_memory_bytes // (self._chunk_pages * self._page_bytes) * self._chunk_pages
        least = self._whole_chunks(self._pool.pages_per_block)
        if pages < least:
            text = (
                f"{format_bytes(message.device_memory_bytes)} does not hold {self._block_tokens} tokens, the least that "
                f"a request needs: give {self._worker} at least {format_bytes(least * self._page_bytes)}"
            )
            return [Send(asker, self._answer(message.call, text))]
        lent_chunks = len(self._pool.lent) - self._away_chunks
        if lent_chunks:
            text = (
                f"{lent_chunks} chunks of {self._worker}'s memory are lent (--elastic), and the pool keeps its size "
                "meanwhile: start the worker with another --device-memory"
            )
            return [Send(asker, self._answer(message.call, text))]
        others, self._asked = (self._asked, []) if pages != self._target_pages else ([], self._asked)
        self._target_pages, self._problem = pages, ""
        text = f"a later order came before this one was carried out: {format_bytes(pages * self._page_bytes)}"
        overtaken: list[Action] = [Send(other, self._answer(call, text)) for other, call in others]
        self._asked.append((asker, message.call))
        if pages < self._pool.ledger.total_pages and not self._pool.lent:
            self._resize_pool(pages)
        return overtaken + self._advance()

    @property
    def _away_chunks(self) -> int:
        return 0 if self._spare is None else self._spare.away_chunks

    def _resize_pool(self, n_pages: int) -> None:
        self.has_shrunk = self.has_shrunk or n_pages < self._pool.ledger.total_pages
        self._pool.resize(n_pages)

    @property
    def settled(self) -> bool:
        """No change of size is under way, and no page is yet to leave."""
        return not self._ordered and self._target_pages == self._memory_pages

    def on_memory(self, n_pages: int, problem: str) -> list[Action]:
        """The ordered change has ended, with memory for `n_pages`. `problem`: why it is not as much as was ordered."""
        self._ordered, self._memory_pages = False, n_pages
        if problem:
            self._target_pages, self._problem = min(self._target_pages, n_pages), problem
        return self._advance()

    def on_chunks_back(self, problem: str) -> list[Action]:
        """The system gave memory back or, if there is a `problem`, did not: then the pool keeps its size."""
        if self.settled or self._ordered:
            return []
        if problem:
            self._target_pages, self._problem = self._memory_pages, problem
        return self._advance()

    def on_tick(self) -> list[Action]:
        """Pages may have been released that are to leave."""
        return self._advance() if self._target_pages < self._memory_pages else []

    def _advance(self) -> list[Action]:
        if self._ordered:
            return []
        if self._spare is not None and self._away_chunks and not self.settled:
            self._spare.recall_chunks(self._away_chunks)
            return []
        ledger, goal = self._pool.ledger, min(self._target_pages, self._memory_pages)
        if goal - goal % self._pool.pages_per_block != ledger.total_pages:
            self._resize_pool(goal)
        wanted = self._target_pages
        if wanted < self._memory_pages:
            wanted = max(wanted, min(self._memory_pages, self._whole_chunks(ledger.kept_pages)))
        if wanted == self._memory_pages:
            asked, self._asked = self._asked, []
            return [Send(asker, self._answer(call, self._problem)) for asker, call in asked]
        self._ordered = True
        return [ResizeMemory(wanted)]

    def _whole_chunks(self, n_pages: int) -> int:
        return -(-n_pages // self._chunk_pages) * self._chunk_pages

    def _answer(self, call: int, problem: str) -> ResizeAnswer:
        ledger = self._pool.ledger
        return ResizeAnswer(
            call=call,
            device_memory_bytes=self._memory_pages * self._page_bytes,
            target_bytes=self._target_pages * self._page_bytes,
            pages=ledger.total_pages,
            leaving_pages=ledger.overhang_pages,
            problem=problem,
        )

    def gauges(self) -> dict[str, float]:
        """As in reports."""
        return {
            "pool_bytes": float(self._memory_pages * self._page_bytes),
            "pool_target_bytes": float(self._target_pages * self._page_bytes),
            "pool_leaving_pages": float(self._pool.ledger.overhang_pages),
        }

    def check(self) -> None:
        """Every page that there is has memory. Raises RuntimeError."""
        kept, memory = self._pool.ledger.kept_pages, self._memory_pages
        if not self._ordered and kept > memory:
            raise RuntimeError(f"pages up to {kept} are in use or may be; there is memory for {memory}")
