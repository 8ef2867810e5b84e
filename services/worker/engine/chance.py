"""Random numbers by counter: the number for output position t depends on (seed, t) alone."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), 53 bits, from a seed (any int) and an output position.

    Two rounds of splitmix64: the first makes a stream out of the seed, the second draws its number `position`.
    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
    """
    stream = _mixed((seed & _MASK) + _GOLDEN)
    return (_mixed(stream + (position + 1) * _GOLDEN) >> 11) * 2.0**-53


def _mixed(state: int) -> int:
    state &= _MASK
    state = (state ^ (state >> 30)) * _FIRST & _MASK
    state = (state ^ (state >> 27)) * _SECOND & _MASK
    return state ^ (state >> 31)


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """`uniform` of many at once."""
    with np.errstate(over="ignore"):
        golden = np.uint64(_GOLDEN)
        streams = _mixed_all(np.array([seed & _MASK for seed in seeds], np.uint64) + golden)
        places = np.array(positions, np.int64).astype(np.uint64) + np.uint64(1)
        return (_mixed_all(streams + places * golden) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed_all(states: NDArray[np.uint64]) -> NDArray[np.uint64]:
    states = (states ^ (states >> np.uint64(30))) * np.uint64(_FIRST)
    states = (states ^ (states >> np.uint64(27))) * np.uint64(_SECOND)
    mixed: NDArray[np.uint64] = states ^ (states >> np.uint64(31))
    return mixed
