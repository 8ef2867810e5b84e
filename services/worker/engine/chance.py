"""Random numbers by counter: the number for output position t depends on (seed, t) alone."""

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), 53 bits, from a seed (any int) and an output position.

    Two rounds of splitmix64: the first makes a stream out of the seed, the second draws its number `position`.
    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
    """
    stream = _mixed((seed & _MASK) + _GOLDEN)
    return (_mixed(stream + (position + 1) * _GOLDEN) >> 11) * 2.0**-53


def _mixed(state: int) -> int:
    state &= _MASK
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
    return state ^ (state >> 31)
