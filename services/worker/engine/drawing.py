"""Drawing tokens at temperature: cuts by min-p, top-k and top-p, then the inverse of the cumulative distribution.

The order is by falling score, ties by rising id; each cut keeps a prefix of it. To find a place in that order nothing
is sorted but one bucket: scores are put into buckets of equal width, whose masses tell where a place lies. Every sum
runs within one row, in the order of its ids, so a row's draw is the same in any batch.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.messages.requests import Sampling

_Floats: TypeAlias = NDArray[np.float64]

_BUCKETS = 1024
_SPAN_NATS = 32.0
"""Buckets reach so far below the likeliest token; the last one holds all that is less likely, e^-32 times or more."""
_LEAST_SPAN_NATS = 2.0**-20
_ELEMENTS_AT_ONCE = 2**21
"""Rows are taken in groups of about so many scores, which bounds the memory to about 50 MB. Smaller groups fit the
caches better, but every operation waits for all compute threads, long where other processes share their cores."""


def draw_rows(logits: Tensor, sampling: Sequence[Sampling], chances: Sequence[float]) -> list[int]:
    """For each row the token at its chance in [0, 1) of its truncated distribution.

    `logits` [rows, vocab] float32 on the CPU, without nan and without +inf; temperatures must be above 0. A row of
    nothing but -inf gives token 0.
    """
    at_once = max(1, _ELEMENTS_AT_ONCE // logits.shape[1])
    tokens: list[int] = []
    for start in range(0, len(sampling), at_once):
        end = start + at_once
        tokens += _draw_group(logits[start:end], sampling[start:end], chances[start:end])
    return tokens


def _draw_group(logits: Tensor, sampling: Sequence[Sampling], chances: Sequence[float]) -> list[int]:
    temperatures = torch.tensor([one.temperature for one in sampling], dtype=torch.float32).unsqueeze(1)
    # The likeliest score is 0 before the division: nothing overflows but upwards in distance, to -inf.
    likeliest = logits.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
    scores = (logits - likeliest).div_(temperatures)
    weights = scores.exp().double()
    span = scores.amin(dim=-1, keepdim=True).neg_().clamp_(_LEAST_SPAN_NATS, _SPAN_NATS)
    buckets = (scores * (-(_BUCKETS - 1) / span)).clamp_(max=_BUCKETS - 1).long()
    masses = torch.zeros(len(sampling), _BUCKETS, dtype=torch.float64).scatter_add_(1, buckets, weights)
    parts = zip(scores.numpy(), weights.numpy(), buckets.numpy(), masses.numpy(), strict=True)
    return [
        _draw(_Order(*part), *asked) for part, asked in zip(parts, zip(sampling, chances, strict=True), strict=True)
    ]


class _Place(NamedTuple):
    """A place in the order; places compare as they lie in it."""

    bucket: int
    rank: int
    """Within the bucket."""


class _Order:
    """One row's tokens by falling score, ties by rising id. A bucket is sorted when something is asked of it."""

    def __init__(
        self, scores: NDArray[np.float32], weights: _Floats, buckets: NDArray[np.int64], masses: _Floats
    ) -> None:
        self._scores, self._weights, self._buckets = scores, weights, buckets
        self._reached = np.cumsum(masses)
        self._sorted: dict[int, tuple[NDArray[np.int64], _Floats]] = {}

    @property
    def mass(self) -> float:
        """Of all tokens; 0 only if none can be drawn."""
        return float(self._reached[-1])

    def count_from(self, score: float) -> int:
        """Tokens whose score is at least that."""
        return int(np.count_nonzero(self._scores >= score))

    def __len__(self) -> int:
        return len(self._scores)

    def nth(self, n_tokens: int) -> _Place:
        """Where the first `n_tokens` (1 or more) end."""
        reached = np.cumsum(np.bincount(self._buckets, minlength=_BUCKETS))
        bucket = int(np.searchsorted(reached, n_tokens, side="left"))
        return _Place(bucket, n_tokens - 1 - (int(reached[bucket - 1]) if bucket else 0))

    def first_at(self, mass: float) -> _Place:
        """The first place up to which the mass is at least that, or the last that has any."""
        return self._find(mass, at_least=True)

    def first_above(self, mass: float) -> _Place:
        """The first place up to which the mass is more than that, or the last that has any."""
        return self._find(mass, at_least=False)

    def _find(self, mass: float, *, at_least: bool) -> _Place:
        last = int(np.searchsorted(self._reached, self._reached[-1], side="left"))
        bucket = min(last, int(np.searchsorted(self._reached, mass, side="left" if at_least else "right")))
        ids, reached = self._sort(bucket)
        rank = int(np.searchsorted(reached, mass, side="left" if at_least else "right"))
        # Sums in two orders differ in their last bits: what looks like the next bucket's is this one's last.
        return _Place(bucket, min(rank, int(np.count_nonzero(self._weights[ids])) - 1))

    def mass_up_to(self, place: _Place) -> float:
        """The mass of that place and all before it."""
        return float(self._sort(place.bucket)[1][place.rank])

    def token(self, place: _Place) -> int:
        """The token there."""
        return int(self._sort(place.bucket)[0][place.rank])

    def _sort(self, bucket: int) -> tuple[NDArray[np.int64], _Floats]:
        """Its ids in order, and the mass up to each of them."""
        found = self._sorted.get(bucket)
        if found is None:
            ids = np.flatnonzero(self._buckets == bucket)
            ids = ids[np.argsort(-self._scores[ids], kind="stable")]
            before = float(self._reached[bucket - 1]) if bucket else 0.0
            found = self._sorted[bucket] = (ids, before + np.cumsum(self._weights[ids]))
        return found


def _draw(order: _Order, sampling: Sampling, chance: float) -> int:
    if order.mass == 0.0:
        return 0
    end: _Place | None = None
    kept = len(order)
    if sampling.min_p > 0.0:
        kept = max(1, order.count_from(math.log(sampling.min_p)))
    if sampling.top_k:
        kept = min(kept, sampling.top_k)
    mass = order.mass
    if kept < len(order):
        end = order.nth(kept)
        mass = order.mass_up_to(end)
    if sampling.top_p < 1.0:
        reached = order.first_at(sampling.top_p * mass)
        end = reached if end is None else min(end, reached)
        mass = order.mass_up_to(end)
    place = order.first_above(chance * mass)
    return order.token(place if end is None else min(place, end))
