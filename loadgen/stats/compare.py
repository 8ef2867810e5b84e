"""A/B: two runs, or two groups of runs, number by number with intervals. Pure; method in `loadgen.stats.resampling`.

Both sides are drawn on their own, a thousand times; of each pair of draws the ratio other / base is taken. A number is
called different if the ratio's 95 % interval leaves 1 out. Runs of one side are pooled.

Measured on equal sides (M/M/4, 500 requests a run, 40 to 80 pairs): the mean end-to-end latency was called different in
15 % of pairs with one run on a side, at a load of 0.5 as of 0.8, and in 5 and 10 % with three; throughput in 4 to 7 %.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from loadgen.results.metrics import Slo
from loadgen.results.records import RequestRecord
from loadgen.results.result import Result
from loadgen.stats.measures import PERCENTILES, latencies, requests_of, shares, throughputs
from loadgen.stats.resampling import Floats, Interval, bounds, estimates

_BASE_SEED, _OTHER_SEED = 1, 2
"""Fixed, so that a comparison is reproducible, and different, so that a run compared with itself is no exception."""
NOT_THE_WORK = frozenset(
    {"url", "header", "label", "cluster", "cluster_flags", "workers", "timeout", "goodput", "seed"}
)
"""Settings that say where a run went and how it was judged, not what it sent; the seed is a fact."""
_FACTS = ("model", "endpoint", "seed", "num_prompts", "request_rate", "arrival", "burstiness", "max_concurrency")
SAME_AS_FACTS = frozenset({"model", "endpoint", "num_requests", "rate", "arrival", "burstiness", "concurrency"})
"""Settings that the facts say too."""


class Verdict(StrEnum):
    """Of the other side's number against the base's."""

    LOWER = "lower"
    HIGHER = "higher"
    NOT_SHOWN = "no difference shown"
    UNKNOWN = "too few samples"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One number of both sides, in the unit of its name."""

    name: str
    """As in result.json."""
    base: float | None
    """None: too few samples."""
    other: float | None
    ratio: Interval | None
    """Other / base; None where a side is unknown, or can be 0."""
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that is to be said of two sides."""

    rows: tuple[Row, ...]
    base_runs: int
    other_runs: int
    not_the_same_work: tuple[str, ...]
    """What differs in what was sent, one each; empty: nothing."""
    warnings: tuple[str, ...]
    """Why single runs should not be trusted."""
    notes: tuple[str, ...]
    """What the intervals do not cover."""


def compare(base: Sequence[Result], other: Sequence[Result], slo: Slo | None = None) -> Comparison:
    """Compare two groups of runs. `slo`: targets for goodput and attainment, the same for both sides.

    Raises ValueError if a side has no run, or a run has no measured request.
    """
    if not base or not other:
        raise ValueError("a comparison needs a run on each side")
    base_side = _Side.of([run.records for run in base], slo, _BASE_SEED)
    other_side = _Side.of([run.records for run in other], slo, _OTHER_SEED)
    rows = tuple(_row(name, base_side, other_side) for name in _names(slo is not None))
    return Comparison(
        rows=rows,
        base_runs=len(base),
        other_runs=len(other),
        not_the_same_work=tuple(differences(base, other)),
        warnings=(*_warnings("base", base), *_warnings("other", other)),
        notes=tuple(_notes(rows, len(base), len(other))),
    )


def differences(base: Sequence[Result], other: Sequence[Result]) -> list[str]:
    """What was not the same work between the sides or, but for the seed, within one: `rate: 4 | 8`."""
    settings = sorted({name for run in (*base, *other) for name in run.facts.settings} - NOT_THE_WORK - SAME_AS_FACTS)
    found = []
    for name in (*_FACTS, *settings):
        of_base, of_other = ([_shown(run, name) for run in side] for side in (base, other))
        within = name != "seed" and (len(set(of_base)) > 1 or len(set(of_other)) > 1)
        if within or set(of_base) != set(of_other):
            found.append(f"{name}: {', '.join(dict.fromkeys(of_base))} | {', '.join(dict.fromkeys(of_other))}")
    return found


def _shown(run: Result, name: str) -> str:
    value = getattr(run.facts, name) if name in _FACTS else run.facts.settings.get(name)
    if isinstance(value, list | tuple):  # JSON knows no tuples, so that only one side of a stored run may be one
        return ", ".join(map(str, value))
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, slots=True)
class _Side:
    seen: Mapping[str, float]
    drawn: Mapping[str, Floats]
    n_units: Mapping[str, int]

    @classmethod
    def of(cls, runs: Sequence[Sequence[RequestRecord]], slo: Slo | None, seed: int) -> "_Side":
        requests = requests_of(runs)
        seen, drawn = estimates([*latencies(requests), *shares(requests, slo)], requests.units, (seed, 0))
        n_units = dict.fromkeys(seen, sum(requests.units.per_run))
        if (rates := throughputs(runs, slo)) is not None:
            measures, units = rates
            seen_rates, drawn_rates = estimates(measures, units, (seed, 1))
            seen, drawn = seen | seen_rates, drawn | drawn_rates
            n_units |= dict.fromkeys(seen_rates, sum(units.per_run))
        return cls(seen, drawn, n_units)


def _names(with_targets: bool) -> list[str]:
    columns = ("mean", *(f"p{percentile}" for percentile in PERCENTILES))
    found = [f"{column}_{name}_ms" for name in ("ttft", "ttst", "tpot") for column in columns]
    found += ["mean_itl_ms", *(f"{column}_e2el_ms" for column in columns)]
    found += ["request_throughput", "output_throughput", "total_token_throughput"]
    return [*found, *(["request_goodput", "attainment"] if with_targets else []), "failed_share"]


def _row(name: str, base: _Side, other: _Side) -> Row:
    base_value, other_value = base.seen.get(name), other.seen.get(name)
    if base_value is None or other_value is None:
        return Row(name=name, base=base_value, other=other_value, ratio=None, verdict=Verdict.UNKNOWN)
    n_units = min(base.n_units[name], other.n_units[name])
    base_drawn, other_drawn = base.drawn[name], other.drawn[name]
    # The difference has the sign of the ratio - 1 in every draw, and exists where the base is 0.
    ends = bounds(other_drawn - base_drawn, n_units)
    if ends is None:
        verdict = Verdict.UNKNOWN
    else:
        verdict = Verdict.HIGHER if ends[0] > 0 else Verdict.LOWER if ends[1] < 0 else Verdict.NOT_SHOWN
    ratio = None
    if base_value > 0 and np.all(base_drawn > 0) and (ends := bounds(other_drawn / base_drawn, n_units)) is not None:
        ratio = Interval(value=other_value / base_value, low=ends[0], high=ends[1])
    return Row(name=name, base=base_value, other=other_value, ratio=ratio, verdict=verdict)


def _warnings(side: str, runs: Sequence[Result]) -> Iterator[str]:
    for number, run in enumerate(runs, start=1):
        name = side if len(runs) == 1 else f"{side} {number}"
        yield from (f"{name}: {text}" for text in run.health.warnings)
        if run.saturation is not None and run.saturation.detected:
            yield f"{name}: saturated, so that latencies grow with the length of the run: {run.saturation.why}"


def _notes(rows: Sequence[Row], base_runs: int, other_runs: int) -> list[str]:
    n_judged = sum(row.verdict is not Verdict.UNKNOWN for row in rows)
    found = [
        f"{n_judged} numbers are judged at 95 % each: were both sides equal, about {n_judged / 20:.0f} would still be "
        "called different, and more where requests queue; believe what neighbouring rows share"
    ]
    if min(base_runs, other_runs) == 1:
        found.append(
            "one run on a side: how much runs differ from each other is not in the intervals; "
            "repeat both sides and give the runs with --base and --other"
        )
    elif min(base_runs, other_runs) < 5:
        found.append(f"{base_runs} and {other_runs} runs: few to draw from, so the intervals are somewhat too narrow")
    return found
