"""Who gives way before it must, so that its KV has left when the room is needed. Pure; only with a host buffer.

Two reasons: the next step will lack blocks (LayerKV, arXiv 2410.00428, section 4.6), or a request whose prompt is computed
elsewhere waits for pages, and with it its first token. Nobody is made to starve: the oldest never gives way, who gives way
has drawn `TURN_TOKENS` since it began last, and who gave way for others is passed by at most `MOST_PASSES` of them.
"""

from collections.abc import Callable, Collection
from collections.abc import Sequence as Run

from common.policy.forecast import Victim, shortfall_blocks, victims
from services.worker.core.parking import Parking
from services.worker.core.prefix import PrefixReuse
from services.worker.core.sequence import Sequence

TURN_TOKENS = 16
MOST_PASSES = 8


class GivingWay:
    """Owns what is wished for by those who wait for pages; whose KV is parked is Parking's."""

    def __init__(self, parking: Parking, reuse: PrefixReuse) -> None:
        self._parking, self._pool, self._block_tokens = parking, reuse.pool, reuse.block_tokens
        self._wished_blocks = 0
        self._yielded = False  # somebody gave way for the wish: who waits may not take that room
        self.slack_ms: Callable[[Sequence], float] = lambda _: 0.0
        """How long a sequence can wait without missing what was promised; who measures that puts it here."""

    # -- the wish of the first who waits for pages

    def no_wish(self) -> None:
        """Nobody waits for pages, as far as is known."""
        self._wished_blocks = 0

    def grants(self, n_blocks: int, waiting: Collection[Sequence], *, fits: bool) -> bool:
        """Whether the first of those who wait for pages may take so many blocks now, which `fits` says are free.

        If it may not for lack of room, it is wished for. `waiting`: who will have its pages again before anybody new, unless
        it gave way for such.
        """
        if not _may_pass(waiting):
            return False
        if not fits:
            self._wished_blocks = n_blocks
            return False
        for one in waiting:
            one.passed = 1 + (one.passed or 0)
        return True

    @property
    def kept_blocks(self) -> int:
        """Blocks that those who gave way must leave to the wish."""
        return self._wished_blocks if self._yielded else 0

    # -- who gives way

    def volunteers(self, running: Run[Sequence], waiting: Collection[Sequence]) -> list[Sequence]:
        """Who gives way now: as many as are needed, or nobody. `running`: oldest first; no step is in flight."""
        if not self._wished_blocks:
            self._yielded = False
        lacking = self._lacking(running)
        if lacking or not self._wished_blocks or not _may_pass(waiting):
            return self._chosen(running, lacking)
        chosen = self._chosen(running, self._wished_blocks + len(running) - self._coming_blocks)
        self._yielded = self._yielded or bool(chosen)
        for one in chosen:
            one.passed = 0
        return chosen

    def is_due(self, running: Run[Sequence], waiting: Collection[Sequence]) -> bool:
        """Whether `volunteers` would name somebody, if no step were in flight."""
        wished = self._wished_blocks and _may_pass(waiting)
        lacking = self._lacking(running) or (wished and self._wished_blocks + len(running) - self._coming_blocks)
        return bool(self._chosen(running, lacking))

    @property
    def _coming_blocks(self) -> int:
        """Blocks that are free, or will be when copies in progress have ended."""
        return (self._pool.available_pages + self._parking.leaving_pages) // self._pool.pages_per_block

    def _lacking(self, running: Run[Sequence]) -> int:
        """Blocks that the step after the next one will lack."""
        growing = sum(one.table.n_blocks * self._block_tokens <= len(one.tokens) for one in running)
        return shortfall_blocks(self._coming_blocks, 0, growing, 0)

    def _chosen(self, running: Run[Sequence], n_blocks: int) -> list[Sequence]:
        """The fewest, in the order of the policy, that free so many blocks; nobody if all of them together do not."""
        if n_blocks <= 0 or not self._parking.buffer.capacity_pages:
            return []
        able = [one for one in running[1:] if self._able(one)]
        order = victims([Victim(self.slack_ms(one), one.table.n_blocks, one.order) for one in able])
        chosen: list[Sequence] = []
        freed = host_pages = 0
        for place in order:
            if freed >= n_blocks:
                break
            one = able[place]
            if self._parking.buffer.admits(host_pages + self._parking.needs_pages(one)):
                host_pages += self._parking.needs_pages(one)
                freed += one.table.n_blocks
                chosen.append(one)
        return chosen if freed >= n_blocks else []

    def _able(self, one: Sequence) -> bool:
        """Whether it has had its turn, and nobody uses its pages."""
        drawn = len(one.tokens) - one.began_tokens
        free = one.loading is None and not (one.held or one.lost)
        return free and drawn >= TURN_TOKENS and self._parking.needs_pages(one) > 0


def _may_pass(waiting: Collection[Sequence]) -> bool:
    """Whether somebody new may take pages although these wait: all of them gave way for such, and not too often."""
    return all(one.passed is not None and one.passed < MOST_PASSES for one in waiting)
