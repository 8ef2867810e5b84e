"""Fewer points that look the same: what a screen cannot show need not be in the file. Pure."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
LIMIT = 2_000
"""Points a trace keeps."""


def thin(values: Numbers, limit: int = LIMIT) -> NDArray[np.intp]:
    """Places of at most `limit` (4 or more) of the values, in order: the ends, and each bucket's lowest and highest."""
    if values.size <= limit:
        return np.arange(values.size)
    edges = np.linspace(0, values.size, (limit - 2) // 2 + 1).astype(np.intp)
    kept = {0, values.size - 1}
    for start, end in pairwise(edges):
        bucket = values[start:end]
        kept |= {int(start + bucket.argmin()), int(start + bucket.argmax())}
    return np.array(sorted(kept), dtype=np.intp)


def compact(values: Numbers, decimals: int = 3) -> list[float | None]:
    """Plain numbers with few digits, for JSON; what is not a number becomes None."""
    return [round(value, decimals) if np.isfinite(value) else None for value in values.tolist()]
