"""Which group a request belongs to: Zipf popularity. Pure.

Group g of G, counted from 0, has the weight 1 / (g + 1)^a. Exponent a = 0: all alike; around 1: as words, pages and
prompts are found to be.
"""

from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from random import Random


def draw_group(random: Random, n_groups: int, exponent: float) -> int:
    """One group; always one number from `random`, so that what is drawn next does not depend on the law."""
    bounds = _bounds(n_groups, exponent)
    return min(n_groups - 1, bisect_right(bounds, random.random() * bounds[-1]))


@lru_cache(maxsize=64)
def _bounds(n_groups: int, exponent: float) -> tuple[float, ...]:
    return tuple(accumulate((group + 1) ** -exponent for group in range(n_groups)))
