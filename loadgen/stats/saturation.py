"""Did work pile up during the run? Past saturation latencies measure the length of the run, not the server. Pure.

The idea of looking at two slopes, of requests in the system and of latency, is GuideLLM's over-saturation check; how it
is done here is our own. Three things make a naive slope test lie, and are dealt with:

- Neighbouring moments are alike, so that thousands of them are worth a few: the arrival window is cut into ten batches
  whose means are compared (batch means; Law, *Simulation Modeling and Analysis*, ch. 9).
- A server that starts empty fills first: the time of two early answers, at most a quarter of the window, is left out.
- Any short queue happens to grow or to shrink: growth counts only beyond what chance does to a queue that is just full.

A run is saturated if requests in the system and latency both grow significantly and the growth is material, or if
answers lag behind arrivals by a seventh or more although latency grows or the server turned requests away.

Simulated M/M/c queues that start empty, c = 1, 4 and 16, 300 runs each, share of runs called saturated (worst c):

    requests    load 0.5   0.8     1.3    2
    100         0 %        2.3 %   57 %   88 %    (c = 1 and 4: 78 % and 100 % of the overloaded)
    300         0 %        0.3 %   97 %   100 %
    1000        0 %        0 %     100 %  100 %

With 1,000 requests and c = 4: 0.3 % at a load of 0.9, 22 % at 1.0, 85 % at 1.1. Small overloads need long runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loadgen.results.records import Outcome, RequestRecord

_LEAST_REQUESTS = 100
"""Fewer cannot tell a queue that grows from one that happens to be long."""
_BATCHES = 10
_T99, _T95 = 2.896, 1.860
"""Student's t for 8 = _BATCHES - 2 degrees of freedom, one-sided 99 % and 95 %."""
_GROWTH_PER_ROOT = 1.25
"""A server exactly at its limit drifts by about the root of the number of arrivals; growth must be beyond that."""
_LAG_SHARE, _LAG_ROOTS = 0.15, 2.0
"""Arrivals that were not answered, as a share and in roots of their number, again for what chance alone does."""
_LEAST_ANSWERS_IN_WINDOW = 3.0
_BLATANT = 3.0
"""Where the window is too short for slopes: late requests took so many times as long as early ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saturation:
    """Verdict on one open-loop run."""

    detected: bool
    why: str
    """One sentence with the numbers."""


@dataclass(frozen=True, slots=True)
class _Trend:
    """A straight line through the batches' means."""

    first: float
    last: float
    t: float

    @property
    def growth(self) -> float:
        return self.last - self.first


@dataclass(frozen=True, slots=True)
class _Arrivals:
    """Requests by the time they were due: a cap on concurrency moves the queue to the client, it does not shorten it."""

    due_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    answered: NDArray[np.bool_]
    turned_away: NDArray[np.bool_]

    @property
    def latency_s(self) -> NDArray[np.float64]:
        return self.end_s - self.due_s


def judge(records: Sequence[RequestRecord]) -> Saturation | None:
    """Verdict on an open-loop run, warm-up included; None if it had too few requests or too short a time to tell.

    A closed loop cannot saturate: do not ask.
    """
    kept = [record for record in records if record.outcome is not Outcome.CANCELLED]  # they tell nothing of its speed
    if len(kept) < _LEAST_REQUESTS:
        return None
    arrivals = _arrivals(kept)
    first_s, last_s = float(arrivals.due_s[0]), float(arrivals.due_s[-1])
    tenth = len(kept) // 10
    early_s = float(np.median(arrivals.latency_s[:tenth]))
    if last_s - first_s < _LEAST_ANSWERS_IN_WINDOW * early_s or last_s == first_s:
        return _judge_ends(early_s, float(np.median(arrivals.latency_s[-tenth:])), last_s - first_s)
    filling_s = min(2 * early_s, (last_s - first_s) / 4)
    edges_s = np.linspace(first_s + filling_s, last_s, _BATCHES + 1)
    in_system = _trend(_mean_in_system(arrivals, edges_s))
    latency = _trend(_mean_latency_s(arrivals, edges_s))
    latency_grows = latency.t > _T95

    inside = (arrivals.due_s >= edges_s[0]) & (arrivals.due_s <= last_s)
    n_arrived, n_away = int(inside.sum()), int((inside & arrivals.turned_away).sum())
    n_answered = int((arrivals.answered & (arrivals.end_s >= edges_s[0]) & (arrivals.end_s <= last_s)).sum())
    n_missing = n_arrived - n_answered

    piles_up = in_system.t > _T99 and latency_grows and in_system.growth >= _GROWTH_PER_ROOT * math.sqrt(n_arrived)
    lags = (
        n_missing >= _LAG_SHARE * n_arrived
        and n_missing >= _LAG_ROOTS * math.sqrt(n_arrived)
        and (latency_grows or n_away >= n_missing / 2)
    )
    numbers = (
        f"while requests arrived, those in the system went from {in_system.first:.1f} to {in_system.last:.1f} and a "
        f"request's time from {latency.first:.2f} to {latency.last:.2f} s; {n_answered} were answered of {n_arrived} "
        f"that came" + (f", {n_away} turned away" if n_away else "")
    )
    return Saturation(detected=piles_up or lags, why=numbers)


def _arrivals(records: Sequence[RequestRecord]) -> _Arrivals:
    kept = sorted(records, key=lambda record: record.arrived_s)
    return _Arrivals(
        due_s=np.array([record.arrived_s for record in kept]),
        end_s=np.array([record.end_s for record in kept]),
        answered=np.array([record.outcome is Outcome.OK for record in kept]),
        turned_away=np.array([record.outcome in (Outcome.REJECTED, Outcome.TIMEOUT) for record in kept]),
    )


def _judge_ends(early_s: float, late_s: float, window_s: float) -> Saturation | None:
    if late_s < _BLATANT * early_s:
        return None
    why = (
        f"the first tenth of the requests took {early_s:.2f} s, the last {late_s:.2f} s, and all arrived within "
        f"{window_s:.2f} s"
    )
    return Saturation(detected=True, why=why)


def _mean_in_system(arrivals: _Arrivals, edges_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Requests in the system, averaged over each batch's time."""
    starts_s, ends_s = edges_s[:-1, None], edges_s[1:, None]
    overlap_s = np.minimum(arrivals.end_s, ends_s) - np.maximum(arrivals.due_s, starts_s)
    means: NDArray[np.float64] = np.clip(overlap_s, 0, None).sum(axis=1) / (edges_s[1] - edges_s[0])
    return means


def _mean_latency_s(arrivals: _Arrivals, edges_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean latency of the answered requests that were due in each batch; NaN where there is none."""
    latency_s, due_s = arrivals.latency_s[arrivals.answered], arrivals.due_s[arrivals.answered]
    sums, _ = np.histogram(due_s, edges_s, weights=latency_s)
    counts, _ = np.histogram(due_s, edges_s)
    means: NDArray[np.float64] = np.divide(sums, counts, out=np.full(_BATCHES, math.nan), where=counts > 0)
    return means


def _trend(means: NDArray[np.float64]) -> _Trend:
    """Least squares over the batches that have a mean; no trend with fewer than four."""
    place = np.arange(_BATCHES, dtype=np.float64)
    known = ~np.isnan(means)
    if known.sum() < 4:
        return _Trend(math.nan, math.nan, 0.0)
    x, y = place[known], means[known]
    x_mean, y_mean = x.mean(), y.mean()
    spread = float(((x - x_mean) ** 2).sum())
    slope = float(((x - x_mean) * (y - y_mean)).sum()) / spread
    rest = y - y_mean - slope * (x - x_mean)
    error = math.sqrt(float((rest**2).sum()) / (len(x) - 2) / spread)
    t = slope / error if error > 0 else math.copysign(math.inf, slope) if slope else 0.0
    ends = y_mean + slope * (np.array([0.0, _BATCHES - 1]) - x_mean)
    return _Trend(max(0.0, float(ends[0])), max(0.0, float(ends[1])), t)
