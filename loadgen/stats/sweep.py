"""Which rate to measure next, and which was the best. Pure: whoever measures asks and tells.

    search = FindRate(start_per_s=1.0)
    while (rate_per_s := search.next_rate()) is not None:
        search.add(Point(rate_per_s=rate_per_s, ...))
    search.best(), search.why_stopped

The highest rate at which enough requests meet their targets is what DistServe (OSDI 2024, section 6.1) and others compare
systems by. It is bracketed by doubling and halving from a start, then bisected on a logarithmic scale, as tolerances of
rates are ratios.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

ATTAINMENT = 0.9
TOLERANCE = 0.1
MAX_RUNS = 16
_LOWEST_SHARE = 2**-7
"""Of the start rate: below it the targets are out of reach at any load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measured rate."""

    rate_per_s: float
    """As it was asked for."""
    attainment: float
    """Share of requests that met their targets."""
    saturated: bool = False
    """Work piled up: whatever the attainment, a longer run would have ended worse."""
    interval: tuple[float, float] | None = None
    """Of the attainment; None: unknown."""
    late: bool = False
    """The generator did not keep the rate, so that the point says nothing of the server."""


class Search(Protocol):
    """A search that is asked and told in turn."""

    why_stopped: str

    def next_rate(self) -> float | None:
        """The rate to measure, per second; None: finished. Asking twice gives the same answer."""
        ...

    def add(self, point: Point) -> None:
        """What came of it."""
        ...

    def best(self) -> float | None:
        """The highest rate that met the targets; None: none did."""
        ...


class ListedRates:
    """Each rate of a list once, in its order."""

    def __init__(self, rates_per_s: Sequence[float], attainment: float = ATTAINMENT) -> None:
        """Raises ValueError for a rate that is not above 0."""
        for rate_per_s in rates_per_s:
            _check_rate(rate_per_s)
        self._rates_per_s, self._attainment = tuple(rates_per_s), attainment
        self._points: list[Point] = []
        self.why_stopped = ""

    def next_rate(self) -> float | None:
        """The next of the list."""
        if len(self._points) < len(self._rates_per_s):
            return self._rates_per_s[len(self._points)]
        self.why_stopped = f"all {len(self._rates_per_s)} rates were measured"
        return None

    def add(self, point: Point) -> None:
        """What came of it."""
        self._points.append(point)

    def best(self) -> float | None:
        """The highest rate of those that met the targets, after repair as in `FindRate`."""
        return _Ladder.of(self._points, self._attainment).highest_good


class FindRate:
    """The highest rate at which at least `attainment` of the requests meet their targets.

    A point whose interval holds the threshold is measured once more, and both count. More load cannot mean more
    attainment: where the points say so, neighbours are averaged until they do not (isotonic regression by pooling
    adjacent violators; Ayer et al. 1955). A late point bounds the search from above and is never the best.
    """

    def __init__(
        self,
        start_per_s: float,
        attainment: float = ATTAINMENT,
        tolerance: float = TOLERANCE,
        max_runs: int = MAX_RUNS,
    ) -> None:
        """`tolerance`: how much higher than the best the rate that failed may be, as a share of the best.

        Raises ValueError for numbers that make no search.
        """
        _check_rate(start_per_s)
        if not 0 < attainment <= 1:
            raise ValueError(f"attainment {attainment:g}: must be above 0 and at most 1")
        if not tolerance > 0:
            raise ValueError(f"tolerance {tolerance:g}: must be above 0")
        if max_runs < 1:
            raise ValueError(f"max_runs {max_runs}: must be 1 or more")
        self._start_per_s, self._attainment = start_per_s, attainment
        self._tolerance, self._max_runs = tolerance, max_runs
        self._points: list[Point] = []
        self.why_stopped = ""

    def add(self, point: Point) -> None:
        """What came of it."""
        self._points.append(point)

    def next_rate(self) -> float | None:
        """The rate to measure; None once the best is known closely enough, or cannot be found."""
        decision = self._decide()
        if isinstance(decision, str):
            self.why_stopped = decision
            return None
        return decision

    def _decide(self) -> float | str:
        """The next rate, or why there is none."""
        if not self._points:
            return self._start_per_s
        if len(self._points) >= self._max_runs:
            return f"{self._max_runs} runs are used up"
        if self._worth_repeating(self._points[-1]):
            return self._points[-1].rate_per_s
        ladder = _Ladder.of(self._points, self._attainment)
        good, bad = ladder.highest_good, ladder.lowest_bad
        if good is None:
            lowest = bad if bad is not None else self._start_per_s
            if lowest > self._start_per_s * _LOWEST_SHARE:
                return lowest / 2
            if ladder.bounded_by_generator:
                return f"the generator could not send even {lowest:g} per second"
            return f"the targets are missed at every load, even at {lowest:g} per second"
        if bad is None:
            return good * 2
        if bad / good <= 1 + self._tolerance:
            what = (
                "the generator could not send more than" if ladder.bounded_by_generator else "the targets are missed at"
            )
            return f"{what} {bad:g} per second, within {self._tolerance:.0%} of the best"
        return math.sqrt(good * bad)

    def best(self) -> float | None:
        """The highest rate that met the targets so far."""
        return _Ladder.of(self._points, self._attainment).highest_good

    def _worth_repeating(self, last: Point) -> bool:
        if last.late or last.saturated or last.interval is None:
            return False
        times = sum(point.rate_per_s == last.rate_per_s for point in self._points)
        return times == 1 and last.interval[0] < self._attainment < last.interval[1]


@dataclass(frozen=True, slots=True)
class _Ladder:
    """What the points say together."""

    highest_good: float | None
    lowest_bad: float | None
    """Above the highest good; None: no rate failed."""
    bounded_by_generator: bool

    @classmethod
    def of(cls, points: Sequence[Point], attainment: float) -> "_Ladder":
        fitted = _never_rising(_mean_by_rate([point for point in points if not point.late]))
        good = max((rate for rate, value in fitted.items() if value >= attainment), default=None)
        bad = [rate for rate, value in fitted.items() if value < attainment]
        late = [point.rate_per_s for point in points if point.late and (good is None or point.rate_per_s > good)]
        return cls(good, min(bad + late, default=None), bool(late) and min(late) < min(bad, default=math.inf))


def _mean_by_rate(points: Sequence[Point]) -> dict[float, list[float]]:
    found: dict[float, list[float]] = {}
    for point in sorted(points, key=lambda point: point.rate_per_s):
        found.setdefault(point.rate_per_s, []).append(0.0 if point.saturated else point.attainment)
    return found


def _never_rising(by_rate: dict[float, list[float]]) -> dict[float, float]:
    """Means by rate, rates rising, pooled with their neighbours where they would rise."""
    pools: list[tuple[list[float], list[float]]] = []
    for rate, values in by_rate.items():
        rates, pooled = [rate], list(values)
        while pools and _mean(pools[-1][1]) < _mean(pooled):
            before_rates, before = pools.pop()
            rates, pooled = before_rates + rates, before + pooled
        pools.append((rates, pooled))
    return {rate: _mean(pooled) for rates, pooled in pools for rate in rates}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _check_rate(rate_per_s: float) -> None:
    if not 0 < rate_per_s < math.inf:
        raise ValueError(f"rate {rate_per_s:g}: must be a number of requests per second above 0")
