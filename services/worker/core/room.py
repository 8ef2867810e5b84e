"""Whether one more sequence may take pages: a place in the steps, and pages to begin and to go on with. Pure."""

from collections.abc import Callable

from kvstore.index.block_pool import BlockPool


class Room:
    """The one count of who has pages or was promised them; it never exceeds `max_running`, which the engine is built for.

    Who runs is the Scheduler's to say, who was promised pages is told by whoever promises.
    """

    def __init__(
        self, pool: BlockPool, layers: int, max_running: int, inflate: Callable[[int], bool] = lambda _: False
    ) -> None:
        """`max_running`: sequences with pages at the most, and segments of one step.

        `inflate(n)`: make so many more pages available, of memory that serves something else; whether that was done.
        """
        self._pool, self._layers, self._inflate = pool, layers, inflate
        self.max_running = max_running
        """To read."""
        self._promised: Callable[[], int] = lambda: 0
        self._kept_blocks: Callable[[], int] = lambda: 0

    def count_promised(self, promised: Callable[[], int]) -> None:
        """From now on `promised()` sequences count that have their pages already and will run, but have not arrived."""
        self._promised = promised

    def keep(self, kept_blocks: Callable[[], int]) -> None:
        """From now on `kept_blocks()` are nobody's to take: somebody who has begun cannot be computed without them."""
        self._kept_blocks = kept_blocks

    def fits(self, n_blocks: int, n_running: int) -> bool:
        """Pages for that many blocks, and one more block for each sequence that runs already or will."""
        others = n_running + self._promised()
        short = (n_blocks + others + self._kept_blocks()) * self._layers - self._pool.available_pages
        return others < self.max_running and (short <= 0 or self._inflate(short))
