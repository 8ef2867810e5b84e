"""Page memory that nobody has used for a while, lent to the system and fetched before it is missed. Pure but for the port
that moves chunks (`CarryOut`).

Lent only on ticks, never while a step is planned. Chunks leave the pool at once; they are pages again when the shell has said
that their memory is there. They go and come a portion at a time; of what is asked for the next portion follows by itself.
"""

from common.ids import Owner
from common.policy.spare import SpareMarks, SpareRule
from kvstore.index.block_pool import BlockPool
from services.worker.core.actions import CarryOut, LendChunks, TakeBackChunks, always_moves

SYSTEM = Owner("system")
"""Who holds the chunks in the block pool whose memory the system has."""


class SpareMemory:
    """Owns which chunks are being fetched, and how many more shall be. What is lent is the pool's."""

    def __init__(self, pool: BlockPool, rule: SpareRule, chunk_pages: int, portion_chunks: int = 64) -> None:
        """`portion_chunks`: in one order, as memory is cleared by the kernel while it comes."""
        self._pool, self._rule, self._chunk_pages = pool, rule, chunk_pages
        self._portion_chunks, self._total_pages = portion_chunks, pool.ledger.total_pages
        self._coming: set[int] = set()
        self._owed_chunks = 0
        self._refused = self._missed = False
        self._carry_out: CarryOut = always_moves
        self.kept_chunks_total = 0
        """Chunks that were to go, and that the system could not unmap."""
        self.refused_chunks_total = 0
        """Chunks that were to come back and for which there was no memory."""

    def carry_out_with(self, carry_out: CarryOut) -> None:
        """Chunks move by this from now on; those that are fetched are told of by `on_chunks_back` when they have come."""
        self._carry_out = carry_out

    @property
    def away_chunks(self) -> int:
        """Chunks whose memory the system has, those that are being fetched included."""
        return len(self._pool.lent.of(SYSTEM))

    @property
    def is_coming(self) -> bool:
        """Whether chunks are being fetched."""
        return bool(self._coming)

    def on_tick(self, now_ms: float, *, may_lend: bool) -> None:
        """Time passed. Not `may_lend`: somebody waits for pages, or the pool is about to have another size."""
        may_lend = may_lend and not self._missed
        self._refused = self._missed = False
        if self._total_pages != self._pool.ledger.total_pages:
            self._total_pages = self._pool.ledger.total_pages
            self._rule.marks = SpareMarks.of(self._total_pages // self._chunk_pages, self._rule.marks.hold_ms)
        free = self._pool.lent.lendable(self._chunk_pages, cached=False)
        change = self._rule.change(free + len(self._coming), self.away_chunks - len(self._coming), now_ms)
        if change < 0:
            self._fetch(-change + len(self._coming))
        elif may_lend and (n_chunks := min(change, free, self._portion_chunks)) > 0:
            chunks = self._pool.lent.lend(n_chunks, self._chunk_pages, SYSTEM)
            if self._carry_out(LendChunks(tuple(chunks), SYSTEM)):  # the rule has its pause before it asks again
                self._pool.lent.take_back(SYSTEM, chunks)
                self.kept_chunks_total += n_chunks

    def recall(self, n_pages: int) -> None:
        """So many pages are missing now: fetch them, if there are so many. None are lent at the next tick in any case."""
        self._missed = True
        if n_pages <= self._pool.ledger.page_ids(SYSTEM).size:
            self._fetch(-(-n_pages // self._chunk_pages))

    def recall_chunks(self, n_chunks: int) -> None:
        """Have so many chunks, or as many as are away."""
        self._fetch(n_chunks)

    def _fetch(self, n_chunks: int) -> None:
        """Have so many, those included that are coming. Not at once after it was refused: the next tick asks again."""
        self._owed_chunks = max(self._owed_chunks, n_chunks - len(self._coming))
        if self._refused or self._coming:
            return
        away = self._pool.lent.of(SYSTEM)
        wanted = tuple(away[: min(self._owed_chunks, self._portion_chunks)])
        self._owed_chunks = min(self._owed_chunks, len(away)) - len(wanted)
        if wanted:
            self._coming.update(wanted)
            self._carry_out(TakeBackChunks(wanted, SYSTEM))

    def on_chunks_back(self, chunks: tuple[int, ...], problem: str) -> None:
        """These have memory again or, if there is a `problem`, still not."""
        self._coming.difference_update(chunks)
        if problem:
            self._refused, self._owed_chunks = True, 0
            self.refused_chunks_total += len(chunks)
        else:
            self._pool.lent.take_back(SYSTEM, chunks)
            self._fetch(self._owed_chunks)

    def counters(self) -> dict[str, float]:
        """As in reports."""
        refused, kept = self.refused_chunks_total, self.kept_chunks_total
        return {"spare_refused_chunks_total": float(refused), "spare_kept_chunks_total": float(kept)}
