"""How many pages become available when owners are over: their own, and those of blocks that nobody else pins. Pure."""

from collections import Counter

from common.block_hash import BlockHash
from common.ids import Owner
from kvstore.index.block_pool import BlockPool


class Freed:
    """Counts, owner by owner, what releasing all of them would make available in a pool that does not change meanwhile."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._pins = Counter[BlockHash]()
        self.pages = 0
        """Of all so far."""

    def add(self, owner: Owner) -> "Freed":
        """One more."""
        self.pages += len(self._pool.pages_of(owner))
        for name in self._pool.pins_of(owner):
            self._pins[name] += 1
            block = self._pool.cache.get(name)
            if block is not None and block.pins == self._pins[name]:  # nobody else's
                self.pages += self._pool.pages_per_block
        return self
