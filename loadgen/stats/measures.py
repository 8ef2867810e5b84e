"""The numbers of a side's runs, in the form that can be resampled. Pure.

Names are the keys of result.json (`p99_ttft_ms`), so that an interval finds its number.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loadgen.results.metrics import Slo, samples_needed
from loadgen.results.records import Outcome, RequestRecord
from loadgen.stats.resampling import Counts, Floats, Measure, Quantiles, Ratio, Units, blocks

LATENCIES: Mapping[str, Callable[[RequestRecord], float | None]] = {
    "ttft": lambda record: record.ttft_s,
    "ttst": lambda record: record.ttst_s,
    "tpot": lambda record: record.tpot_s,
    "e2el": lambda record: record.e2e_s,
}
PERCENTILES = (50, 90, 95, 99)
SHARES = ("failed_share", "attainment")
_TIME_PARTS = 20
_LEAST_ENDS = 2 * _TIME_PARTS
"""Fewer answers leave most parts of the run with one or none."""


@dataclass(frozen=True, slots=True)
class Requests:
    """Measured, not cancelled requests of a side's runs, each with the block it belongs to."""

    records: tuple[RequestRecord, ...]
    block: Counts
    units: Units


def requests_of(runs: Sequence[Sequence[RequestRecord]]) -> Requests:
    """Blocks of each run, numbered through. Raises ValueError if a run has no measured request."""
    records: list[RequestRecord] = []
    block: list[Counts] = []
    per_run: list[int] = []
    for run in runs:
        kept = [record for record in run if record.measured and record.outcome is not Outcome.CANCELLED]
        if not kept:
            raise ValueError("a run without a measured request has no numbers")
        of_run, n_blocks = blocks(kept)
        block.append(of_run + sum(per_run))
        records += kept
        per_run.append(n_blocks)
    return Requests(tuple(records), np.concatenate(block), Units(tuple(per_run)))


def latencies(requests: Requests) -> list[Measure]:
    """Mean and percentiles of TTFT, TTST, TPOT and E2E, and the mean ITL, in ms; without those that have no sample.

    A percentile is left out below the number of samples that it needs.
    """
    answered = np.array([record.outcome is Outcome.OK for record in requests.records])
    found: list[Measure] = []
    for name, read in LATENCIES.items():
        values_s = np.array([np.nan if (value_s := read(record)) is None else value_s for record in requests.records])
        known = answered & ~np.isnan(values_s)
        samples_ms, unit = values_s[known] * 1e3, requests.block[known]
        asked = [percentile for percentile in PERCENTILES if samples_ms.size >= samples_needed(percentile)]
        if samples_ms.size:
            found.append(_mean(f"mean_{name}_ms", samples_ms, np.ones_like(samples_ms), unit, requests))
        if asked:
            names = [f"p{percentile}_{name}_ms" for percentile in asked]
            found.append(Quantiles(names, asked, samples_ms, unit))
    gaps = [record.token_gaps_s() if record.outcome is Outcome.OK else [] for record in requests.records]
    n_gaps = np.array([len(each) for each in gaps], dtype=np.float64)
    if n_gaps.any():
        total_ms = np.array([sum(each) for each in gaps]) * 1e3
        found.append(_mean("mean_itl_ms", total_ms, n_gaps, requests.block, requests))
    return found


def shares(requests: Requests, slo: Slo | None) -> list[Measure]:
    """The share of requests that failed and, with targets, `attainment`: the share that met them all."""
    ones = np.ones(len(requests.records))
    failed = np.array([float(record.outcome.failed) for record in requests.records])
    found: list[Measure] = [_mean("failed_share", failed, ones, requests.block, requests)]
    if slo is not None:
        met = np.array([float(slo.met_by(record)) for record in requests.records])
        found.append(_mean("attainment", met, ones, requests.block, requests))
    return found


def throughputs(runs: Sequence[Sequence[RequestRecord]], slo: Slo | None) -> tuple[list[Measure], Units] | None:
    """Whole-run rates per second, by equal parts of each run's time; None if a run has too few answers for that.

    Tokens count in the part in which their request ended.
    """
    done = [[record for record in run if record.outcome is Outcome.OK] for run in runs]
    if min(map(len, done)) < _LEAST_ENDS:
        return None
    parts: list[Counts] = []
    seconds: list[float] = []
    for run, answers in zip(runs, done, strict=True):
        first_s, last_s = min(record.sent_s for record in run), max(record.end_s for record in run)
        edges_s = np.linspace(first_s, last_s, _TIME_PARTS + 1)
        ends_s = np.array([record.end_s for record in answers])
        part = np.clip(np.searchsorted(edges_s, ends_s, side="right") - 1, 0, _TIME_PARTS - 1)
        parts.append(part + _TIME_PARTS * len(parts))
        seconds += [(last_s - first_s) / _TIME_PARTS] * _TIME_PARTS
    unit, span_s = np.concatenate(parts), np.array(seconds)
    answers = [record for run in done for record in run]

    def rate(name: str, amounts: Iterable[float]) -> Measure:
        return Ratio(name, _by_unit(unit, np.fromiter(amounts, np.float64), len(span_s)), span_s)

    found = [
        rate("request_throughput", (1.0 for _ in answers)),
        rate("output_throughput", (float(record.output_tokens) for record in answers)),
        rate("total_token_throughput", (float(record.prompt_tokens + record.output_tokens) for record in answers)),
    ]
    if slo is not None:
        found.append(rate("request_goodput", (float(slo.met_by(record)) for record in answers)))
    return found, Units((_TIME_PARTS,) * len(runs))


def _mean(name: str, sums: Floats, counts: Floats, unit: Counts, requests: Requests) -> Ratio:
    n_units = sum(requests.units.per_run)
    return Ratio(name, _by_unit(unit, sums, n_units), _by_unit(unit, counts, n_units))


def _by_unit(unit: Counts, amounts: Floats, n_units: int) -> Floats:
    return np.bincount(unit, amounts, n_units).astype(np.float64)
