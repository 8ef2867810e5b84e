"""Which cached block goes next? Pure: a score when a block is used; the lowest score goes first.

A cache keeps the invariant that matters to every policy by itself: of a chain of blocks the last goes before the one
before it, because a block is of use only with all its ancestors.
"""

from dataclasses import dataclass
from typing import Protocol


class EvictionPolicy(Protocol):
    """Scores blocks. Scores of one block must not fall while `use` and `floor` rise."""

    def score(self, use: int, floor: float, depth: int) -> float:
        """`use`: running number of this use. `floor`: score of the last victim. `depth`: blocks before this one."""
        ...


@dataclass(frozen=True, slots=True)
class Lru:
    """Least recently used first."""

    def score(self, use: int, floor: float, depth: int) -> float:
        """The number of the use itself."""
        return float(use)


@dataclass(frozen=True, slots=True)
class CostAware:
    """Keeps what is dear to recompute: GreedyDual (Young 1994) with the cost of computing a block anew.

    The cost of a block after `depth` others is 1 for its matrix products and depth / `attention_equal_blocks` for its
    attention over what lies before. What nobody uses ages all the same, because the floor rises with every victim.
    """

    attention_equal_blocks: float = 256.0
    """Depth at which attention costs as much as the matrix products."""

    def score(self, use: int, floor: float, depth: int) -> float:
        """The floor and the cost."""
        return floor + 1.0 + depth / self.attention_equal_blocks


EVICTION_POLICIES: dict[str, type[Lru] | type[CostAware]] = {"lru": Lru, "cost-aware": CostAware}
