"""Who gives way to others, with its pages. Pure.

When a running sequence lacks pages and none is free, the youngest must. With a host buffer some give way before that, so that
their KV has left when the room is needed, for two reasons: the next step will lack blocks (LayerKV, arXiv 2410.00428,
section 4.6), or a request whose prompt is computed elsewhere waits for pages, and with it its first token. Nobody is made to
starve: of those who do so the oldest is none, they have drawn `TURN_TOKENS` since they began last, and who gave way for others
is passed by at most `MOST_PASSES` of them. Who has to give way is the youngest that can: the oldest only if no other can.
"""

from collections.abc import Callable

from common.policy.forecast import Victim, shortfall_blocks, victims
from services.worker.core.freed import Freed
from services.worker.core.lineup import Lineup
from services.worker.core.parking import Parking
from services.worker.core.prefix import PrefixReuse
from services.worker.core.sequence import Sequence

TURN_TOKENS = 16


class GivingWay:
    """Owns what is wished for by those who wait for pages. Who gives way is parked, or computed again."""

    def __init__(self, lineup: Lineup, parking: Parking, reuse: PrefixReuse) -> None:
        self._lineup, self._parking, self._reuse = lineup, parking, reuse
        self._pool, self._block_tokens = reuse.pool, reuse.block_tokens
        self.preemptions_total = 0
        self._wished_blocks = 0
        self._yielded = False  # somebody gave way for the wish: who waits may not take that room
        self.slack_ms: Callable[[Sequence], float] = lambda _: 0.0
        """How long a sequence can wait without missing what was promised; who measures that puts it here."""
        self.let_go: Callable[[], bool] = lambda: False
        """Frees pages that nobody needs at once, some at a time; False if there are none."""

    # -- the wish of the first who waits for pages

    def no_wish(self) -> None:
        """Nobody waits for pages, as far as is known."""
        self._wished_blocks = 0

    def grants(self, n_blocks: int, *, fits: bool) -> bool:
        """Whether the first of those who wait for pages may take so many blocks now, which `fits` says are free.

        If it may not for lack of room, it is wished for. Who waits has its pages again before anybody new, unless it gave way
        for such.
        """
        if not self._lineup.may_pass():
            return False
        if not fits:
            self._wished_blocks = n_blocks
            return False
        self._lineup.pass_by()
        return True

    @property
    def kept_blocks(self) -> int:
        """Blocks that those who gave way must leave to the wish."""
        return self._wished_blocks if self._yielded else 0

    # -- who gives way

    def grow(self, reach: Callable[[Sequence], bool]) -> list[Sequence]:
        """Give every running sequence the pages for its next token, oldest first, at the cost of the youngest that can give way.

        `reach`: gives them, or says that there are none. Returns those that must wait: all who could give way are being
        loaded into, or enough of their pages are leaving. No step is in flight.
        """
        starved: list[Sequence] = []
        running, layers = self._lineup.running, self._pool.pages_per_block
        for sequence in list(running):
            while sequence in running and not reach(sequence):
                if self.let_go():
                    continue
                victim = next((one for one in reversed(running) if one.loading is None and one.ring is None), None)
                if victim is None or self._parking.leaving_pages > len(starved) * layers:
                    starved.append(sequence)
                    break
                self._give_way(victim)
        for volunteer in self._volunteers():
            self._give_way(volunteer)
        return starved

    def _give_way(self, victim: Sequence) -> None:
        if not self._parking.take(victim):
            self._reuse.give_up(victim)
        self.preemptions_total += 1
        self._lineup.wait(victim)

    def _volunteers(self) -> list[Sequence]:
        """Who gives way although it need not: as many as are needed, or nobody."""
        if not self._wished_blocks:
            self._yielded = False
        while self._lacking and self.let_go():
            pass
        lacking = self._lacking
        if lacking or not self._wished_blocks or not self._lineup.may_pass():
            return self._chosen(lacking)
        chosen = self._chosen(self._lacking_for_wish)
        self._yielded = self._yielded or bool(chosen)
        for one in chosen:
            one.passed = 0
        return chosen

    def is_due(self) -> bool:
        """Whether somebody would give way although it need not, if no step were in flight."""
        wished = self._wished_blocks and self._lineup.may_pass()
        return bool(self._chosen(self._lacking or (self._lacking_for_wish if wished else 0)))

    @property
    def _lacking_for_wish(self) -> int:
        return self._wished_blocks + len(self._lineup.running) - self._coming_blocks

    @property
    def _coming_blocks(self) -> int:
        """Blocks that are free, or will be when copies in progress have ended."""
        return (self._pool.available_pages + self._parking.leaving_pages) // self._pool.pages_per_block

    @property
    def _lacking(self) -> int:
        """Blocks that the step after the next one will lack; who ends with the next one takes none, and leaves its own."""
        growing, released = 0, Freed(self._pool)
        for one in self._lineup.running:
            if len(one.tokens) + 1 < one.limit_tokens:
                growing += one.table.n_blocks * self._block_tokens <= len(one.tokens)
            elif one.uncomputed_tokens == 1 and not one.is_barred:
                released.add(one.owner)
        return shortfall_blocks(self._coming_blocks, released.pages // self._pool.pages_per_block, growing)

    def _chosen(self, n_blocks: int) -> list[Sequence]:
        """The fewest, in the order of the policy, that free so many blocks; nobody if all of them together do not."""
        if n_blocks <= 0 or not self._parking.buffer.capacity_pages:
            return []
        able = [one for one in self._lineup.running[1:] if self._able(one)]
        alone = [Freed(self._pool).add(one.owner).pages // self._pool.pages_per_block for one in able]
        order = victims([Victim(self.slack_ms(one), n, one.order) for one, n in zip(able, alone, strict=True)])
        chosen: list[Sequence] = []
        freed, n_pages, host_pages = Freed(self._pool), n_blocks * self._pool.pages_per_block, 0
        for place in order:
            if freed.pages >= n_pages:
                break
            one = able[place]
            if self._parking.buffer.admits(host_pages + self._parking.needs_pages(one)):
                host_pages += self._parking.needs_pages(one)
                freed.add(one.owner)
                chosen.append(one)
        return chosen if freed.pages >= n_pages else []

    def _able(self, one: Sequence) -> bool:
        """Whether it has had its turn, and nobody uses its pages."""
        drawn = len(one.tokens) - one.began_tokens
        free = one.loading is None and one.ring is None and not (one.held or one.lost)
        return free and drawn >= TURN_TOKENS and self._parking.needs_pages(one) > 0
