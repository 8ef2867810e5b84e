"""What a run would have shown if chance had dealt otherwise: the bootstrap, over blocks of conversations. Pure.

Source: Efron & Tibshirani, *An Introduction to the Bootstrap* (1993): percentile intervals ch. 13, structured data ch. 8.
The tails are widened for the number of units as in Hesterberg, *What Teachers Should Know About the Bootstrap* (2015).

What is drawn with replacement is not a request. Turns of a conversation share their history, so conversations stay
whole. Neighbours in time shared a queue, so conversations that began one after the other are drawn together, the more of
them the longer latencies stay alike: Carlstein's rule for blocks, n^(1/3) (2 r / (1 - r^2))^(2/3) (*Annals of Statistics*,
1986), with the r of the first-order process that has the autocorrelation time seen in TTFT or E2E (Geyer's sum over
pairs of lags, *Statistical Science*, 1992). Throughput is a property of time: there, twenty equal parts of the run are
drawn. With several runs on a side, runs are drawn first and then parts of the runs drawn.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from loadgen.results.records import RequestRecord

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

RESAMPLES = 1000
CONFIDENCE = 0.95
_LEAST_BLOCKS = 10
"""Of fewer nothing can be learnt, however alike neighbours are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A number and where it lies with `CONFIDENCE`, as far as one can tell from the runs at hand."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Units:
    """What is drawn: so many units of each run, numbered through from the first run to the last."""

    per_run: tuple[int, ...]

    def draws(self, seed: Sequence[int]) -> Iterator[Counts]:
        """RESAMPLES times: how often each unit was drawn. Equal seeds give equal draws."""
        rng = np.random.default_rng(seed)
        first = np.concatenate([[0], np.cumsum(self.per_run)])
        for _ in range(RESAMPLES):
            times = np.zeros(int(first[-1]), dtype=np.int64)
            n_runs = len(self.per_run)
            for run in rng.integers(n_runs, size=n_runs) if n_runs > 1 else (0,):
                drawn = rng.integers(self.per_run[run], size=self.per_run[run])
                times[first[run] : first[run + 1]] += np.bincount(drawn, minlength=self.per_run[run])
            yield times

    def once(self) -> Counts:
        """Each unit once: the runs as they were."""
        return np.ones(sum(self.per_run), dtype=np.int64)


class Measure(Protocol):
    """Numbers that a draw of units gives; NaN where it holds no sample."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the numbers, in their order."""
        ...

    def of(self, times: Counts) -> Sequence[float]:
        """The numbers, if each unit had occurred so many times."""
        ...


@dataclass(frozen=True, slots=True)
class Ratio:
    """Sum of one thing over sum of another: a mean, a share, a rate per second."""

    name: str
    over: Floats
    """Numerator by unit."""
    under: Floats

    @property
    def names(self) -> tuple[str, ...]:
        """The one."""
        return (self.name,)

    def of(self, times: Counts) -> Sequence[float]:
        """Their ratio."""
        under = float(times @ self.under)
        return (float(times @ self.over) / under if under else math.nan,)


class Quantiles:
    """Percentiles of samples that belong to units, interpolated as `numpy.percentile` does."""

    def __init__(self, names: Sequence[str], percentiles: Sequence[float], samples: Floats, units: Counts) -> None:
        """`units`: to which unit each sample belongs."""
        order = np.argsort(samples, kind="stable")
        self._sorted, self._units = samples[order], units[order]
        self._shares = np.array(percentiles) / 100
        self.names = tuple(names)

    def of(self, times: Counts) -> Sequence[float]:
        """The percentiles."""
        until = np.cumsum(times[self._units])  # samples up to each place, repeats counted
        if not until.size or not until[-1]:
            return [math.nan] * len(self.names)
        place = self._shares * (until[-1] - 1)
        below = np.floor(place)
        lower = self._sorted[np.searchsorted(until, below, side="right")]
        upper = self._sorted[np.searchsorted(until, np.ceil(place), side="right")]
        found: list[float] = (lower + (place - below) * (upper - lower)).tolist()
        return found


def estimates(
    measures: Sequence[Measure], units: Units, seed: Sequence[int]
) -> tuple[dict[str, float], dict[str, Floats]]:
    """Each number as it was, and as RESAMPLES draws make it."""
    names = [name for measure in measures for name in measure.names]
    drawn = [[value for measure in measures for value in measure.of(times)] for times in units.draws(seed)]
    columns = np.array(drawn, dtype=np.float64).reshape(RESAMPLES, len(names)).T
    seen = [value for measure in measures for value in measure.of(units.once())]
    return dict(zip(names, seen, strict=True)), dict(zip(names, columns, strict=True))


def bounds(drawn: Floats, n_units: int) -> tuple[float, float] | None:
    """Between which the middle CONFIDENCE of the draws of so many units lies; None if some draw gave no number."""
    if n_units < 2 or not np.isfinite(drawn).all():
        return None
    normal = NormalDist()
    wider = _student(normal.inv_cdf((1 + CONFIDENCE) / 2), n_units - 1) * math.sqrt(n_units / (n_units - 1))
    tail = 100 * normal.cdf(-wider)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return float(low), float(high)


def _student(z: float, freedom: int) -> float:
    """Student's quantile from the normal one by its Cornish-Fisher series; within 0.5 % from 5 degrees of freedom on."""
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def blocks(records: Sequence[RequestRecord]) -> tuple[Counts, int]:
    """The block of each record, and how many blocks there are: conversations that began one after the other."""
    by_conversation: defaultdict[int, list[RequestRecord]] = defaultdict(list)
    for record in records:
        by_conversation[record.conversation].append(record)
    in_order = sorted(by_conversation.values(), key=lambda turns: min(record.sent_s for record in turns))
    ttft_s = [_mean_s(record.ttft_s for record in turns) for turns in in_order]
    e2e_s = [_mean_s(record.e2e_s for record in turns) for turns in in_order]
    length = _block_length(max(alike_for(ttft_s), alike_for(e2e_s)), len(in_order))
    block_of = {turns[0].conversation: place // length for place, turns in enumerate(in_order)}
    found = np.array([block_of[record.conversation] for record in records], dtype=np.int64)
    return found, math.ceil(len(in_order) / length)


def _block_length(alike: float, n_conversations: int) -> int:
    r = (alike - 1) / (alike + 1)
    length = round(float(n_conversations ** (1 / 3) * (2 * r / (1 - r * r)) ** (2 / 3)))
    return max(1, min(length, n_conversations // _LEAST_BLOCKS))


def alike_for(values: Sequence[float]) -> float:
    """Autocorrelation time: so many neighbours are worth one that stands alone; 1 or more. NaN are left out."""
    known = np.array(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if known.size < 4 or known.std() == 0:
        return 1.0
    spectrum = np.fft.rfft(known - known.mean(), 2 * known.size)
    products = np.fft.irfft(spectrum * spectrum.conj())[: known.size]
    correlation = products / products[0]
    pairs = correlation[: known.size // 2 * 2].reshape(-1, 2).sum(axis=1)
    until = int(np.argmax(pairs <= 0)) if (pairs <= 0).any() else len(pairs)
    return max(1.0, float(2 * pairs[:until].sum() - 1))


def _mean_s(values_s: Iterable[float | None]) -> float:
    known_s = [value_s for value_s in values_s if value_s is not None]
    return sum(known_s) / len(known_s) if known_s else math.nan
