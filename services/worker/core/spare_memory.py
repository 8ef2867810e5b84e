"""Page memory that nobody has used for a while, lent to the system and fetched before it is missed. Pure.

Only on ticks, never while a step is planned. Chunks leave the pool at once; they are pages again when the shell has said
that their memory is there.
"""

from common.ids import Owner
from common.policy.spare import SpareRule
from kvstore.index.block_pool import BlockPool
from services.worker.core.actions import LendChunks, TakeBackChunks

SYSTEM = Owner("system")
"""Who holds the chunks in the block pool whose memory the system has."""
_MOST_CHUNKS = 64
"""In one tick: memory is cleared by the kernel as it comes."""


class SpareMemory:
    """Owns which chunks are being fetched. What is lent is the pool's."""

    def __init__(self, pool: BlockPool, rule: SpareRule, chunk_pages: int) -> None:
        self._pool, self._rule, self._chunk_pages = pool, rule, chunk_pages
        self._coming: set[int] = set()
        self._orders: list[LendChunks | TakeBackChunks] = []
        self.problem = ""
        """Why the last chunks that were to come back did not; empty if they did."""

    @property
    def away_chunks(self) -> int:
        """Chunks whose memory the system has, those that are being fetched included."""
        return len(self._pool.lent.of(SYSTEM))

    def on_tick(self, now_ms: float, *, may_lend: bool) -> None:
        """Time passed. Not `may_lend`: the pool is about to have another size."""
        free = self._pool.lent.lendable(self._chunk_pages, cached=False)
        change = self._rule.change(free + len(self._coming), self.away_chunks - len(self._coming), now_ms)
        if change < 0:
            self._fetch(-change)
        elif may_lend and (n_chunks := min(change, free, _MOST_CHUNKS)) > 0:
            chunks = self._pool.lent.lend(n_chunks, self._chunk_pages, SYSTEM)
            self._orders.append(LendChunks(tuple(chunks), SYSTEM))

    def recall(self, n_pages: int) -> None:
        """So many pages are missing now: fetch them, as far as they are away."""
        missing = -(-n_pages // self._chunk_pages) - len(self._coming)
        if missing > 0:
            self._fetch(missing)

    def _fetch(self, n_chunks: int) -> None:
        away = [chunk for chunk in self._pool.lent.of(SYSTEM) if chunk not in self._coming]
        wanted = tuple(away[: min(n_chunks, _MOST_CHUNKS)])
        if wanted:
            self._coming.update(wanted)
            self._orders.append(TakeBackChunks(wanted, SYSTEM))

    def on_chunks_back(self, chunks: tuple[int, ...], problem: str) -> None:
        """These have memory again or, if there is a `problem`, still not."""
        self._coming.difference_update(chunks)
        self.problem = problem
        if not problem:
            self._pool.lent.take_back(SYSTEM, chunks)

    def take_orders(self) -> list[LendChunks | TakeBackChunks]:
        """What the shell has to do."""
        orders, self._orders = self._orders, []
        return orders
