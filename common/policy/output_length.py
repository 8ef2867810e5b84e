"""How many tokens will an answer still have? Learned from the lengths of answers that ended. Pure.

LayerKV (arXiv 2410.00428) takes a trained predictor for this; a percentile of what was seen lately needs no model, and it is
corrected whenever an answer outlives it.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque

_REMEMBERED = 1024


class LengthPredictor:
    """Owns the lengths of the last answers, oldest out first."""

    def __init__(self, percentile: float = 0.9, *, remembered: int = _REMEMBERED) -> None:
        """`percentile`: above 0, up to 1; of lengths that are still possible. Raises ValueError."""
        if not 0.0 < percentile <= 1.0:
            raise ValueError(f"percentile={percentile}: must be above 0 and up to 1")
        if remembered < 1:
            raise ValueError(f"remembered={remembered}: must be 1 or more")
        self._percentile, self._remembered = percentile, remembered
        self._in_time: deque[int] = deque()
        self._sorted: list[int] = []

    def learn(self, tokens: int) -> None:
        """An answer ended with so many."""
        if len(self._in_time) == self._remembered:
            del self._sorted[bisect_left(self._sorted, self._in_time.popleft())]
        self._in_time.append(tokens)
        insort(self._sorted, tokens)

    def remaining(self, generated: int, most: int) -> int:
        """Tokens, up to `most`, that an answer of `generated`, which has not ended, will still get: the percentile of the lengths
        seen that are longer, less what it has. `most` if none was longer: nothing else is known of it.
        """
        first = bisect_right(self._sorted, generated)
        n_longer = len(self._sorted) - first
        if not n_longer:
            return most
        return min(most, self._sorted[first + math.ceil(self._percentile * n_longer) - 1] - generated)
