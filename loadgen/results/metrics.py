"""Records in, numbers out. Pure; times in seconds, as in the records.

Latency counts requests that were answered; cancelled and failed ones are counted apart. Throughput is taken over the
whole run, from the first send to the last end, its drain included.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loadgen.results.records import Outcome, RequestRecord

P99_NEEDS_SAMPLES = 200
"""Below this the 99th percentile is little more than the largest sample, and is not given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Summary of one latency over its samples. Percentiles interpolate linearly."""

    samples: int
    mean_s: float
    std_s: float
    """Of the population."""
    p50_s: float
    p90_s: float
    p95_s: float
    p99_s: float | None
    """None below P99_NEEDS_SAMPLES samples."""
    max_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Latency targets of one request; None: no target. All that are set must be met."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def met_by(self, record: RequestRecord) -> bool:
        """True if the request was answered within every target. One token meets any TPOT."""
        if record.outcome is not Outcome.OK:
            return False
        pairs = ((self.ttft_s, record.ttft_s), (self.tpot_s, record.tpot_s), (self.e2e_s, record.e2e_s))
        return all(target is None or value is None or value <= target for target, value in pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """All numbers of a run."""

    duration_s: float
    completed: int
    failed: int
    cancelled: int
    outcomes: Mapping[str, int]
    """Requests by outcome, only those that occurred."""
    input_tokens: int
    """Of completed requests, like all token counts; asked for, where the server did not count."""
    output_tokens: int
    cached_tokens: int | None
    """None if no answer told."""
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    goodput_per_s: float | None
    """Requests that met the targets, per second; None without targets."""
    peak_output_tokens_per_s: float
    """Most tokens in one second of the run, seconds counted from the first send; all requests."""
    peak_concurrent: int
    mean_concurrent: float
    ttft: Distribution | None
    """None without a sample, as below."""
    ttst: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    chunk_gap: Distribution | None
    e2e: Distribution | None
    tokens_per_chunk: float | None
    counted_by: Mapping[str, int]
    """Completed requests by the source of their token count."""
    wrong_output_lengths: int
    """Completed requests with another number of tokens than was asked for."""
    wrong_input_lengths: int
    """Completed requests whose prompt the server counted differently."""


def distribution(samples_s: Iterable[float | None]) -> Distribution | None:
    """Summary of the samples that are not None; None if there are none."""
    values = np.fromiter((sample for sample in samples_s if sample is not None), dtype=np.float64)
    if values.size == 0:
        return None
    p50, p90, p95, p99 = (float(value) for value in np.percentile(values, [50, 90, 95, 99]))
    return Distribution(
        samples=values.size,
        mean_s=float(values.mean()),
        std_s=float(values.std()),
        p50_s=p50,
        p90_s=p90,
        p95_s=p95,
        p99_s=p99 if values.size >= P99_NEEDS_SAMPLES else None,
        max_s=float(values.max()),
    )


def summarize(records: Sequence[RequestRecord], slo: Slo | None = None) -> Summary:
    """The numbers of a run. Raises ValueError without records."""
    if not records:
        raise ValueError("a run without requests has no numbers")
    first_s, last_s = min(record.sent_s for record in records), max(record.end_s for record in records)
    duration_s = max(last_s - first_s, 1e-9)
    done = [record for record in records if record.outcome is Outcome.OK]
    input_tokens = sum(record.prompt_tokens for record in done)
    output_tokens = sum(record.output_tokens for record in done)
    chunks = sum(len(record.chunk_s) for record in done)
    cached = [record.cached_tokens for record in done if record.cached_tokens is not None]
    return Summary(
        duration_s=duration_s,
        completed=len(done),
        failed=sum(record.outcome.failed for record in records),
        cancelled=sum(record.outcome is Outcome.CANCELLED for record in records),
        outcomes=dict(sorted(Counter(record.outcome.value for record in records).items())),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cached_tokens=sum(cached) if cached else None,
        requests_per_s=len(done) / duration_s,
        output_tokens_per_s=output_tokens / duration_s,
        total_tokens_per_s=(input_tokens + output_tokens) / duration_s,
        goodput_per_s=None if slo is None else sum(map(slo.met_by, records)) / duration_s,
        peak_output_tokens_per_s=_peak_tokens_per_s(records, first_s),
        peak_concurrent=_peak_concurrent(records),
        mean_concurrent=sum(record.end_s - record.sent_s for record in records) / duration_s,
        ttft=distribution(record.ttft_s for record in done),
        ttst=distribution(record.ttst_s for record in done),
        tpot=distribution(record.tpot_s for record in done),
        itl=distribution(gap_s for record in done for gap_s in record.token_gaps_s()),
        chunk_gap=distribution(gap_s for record in done for gap_s in record.chunk_gaps_s()),
        e2e=distribution(record.e2e_s for record in done),
        tokens_per_chunk=output_tokens / chunks if chunks else None,
        counted_by=dict(sorted(Counter(record.counted_by for record in done).items())),
        wrong_output_lengths=sum(record.output_tokens != record.asked_output_tokens for record in done),
        wrong_input_lengths=sum(
            None not in (asked := record.asked_input_tokens, record.input_tokens) and record.input_tokens != asked
            for record in done
        ),
    )


def _peak_tokens_per_s(records: Sequence[RequestRecord], first_s: float) -> float:
    by_second: Counter[int] = Counter()
    for record in records:
        weights = record.chunk_tokens if record.chunk_tokens is not None else [1] * len(record.chunk_s)
        for at_s, n_tokens in zip(record.chunk_s, weights, strict=True):
            by_second[int(at_s - first_s)] += n_tokens
    return float(max(by_second.values(), default=0))


def _peak_concurrent(records: Sequence[RequestRecord]) -> int:
    # At equal times an end comes before a start: a closed loop of n never shows n + 1.
    changes = sorted([(record.sent_s, 1) for record in records] + [(record.end_s, -1) for record in records])
    running = peak = 0
    for _, change in changes:
        running += change
        peak = max(peak, running)
    return peak
