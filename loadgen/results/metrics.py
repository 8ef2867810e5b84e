"""Records in, numbers out. Pure; times in seconds, as in the records.

Latency counts measured requests that were answered; warm-up, cancelled and failed ones are counted apart. Throughput is
taken over the whole run, from the first send to the last end, its drain included; `steady_*` leaves the drain out.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loadgen.results.records import Outcome, RequestRecord
from loadgen.results.throughput import Steady, peak_concurrent, peak_tokens_per_s, steady

P99_NEEDS_SAMPLES = 200
"""Below this the 99th percentile is little more than the largest sample, and is not given."""
PERCENTILES = (50.0, 90.0, 95.0, 99.0)
"""Given where nothing else is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Summary of one latency over its samples. Percentiles interpolate linearly."""

    samples: int
    mean_s: float
    std_s: float
    """Of the population."""
    p50_s: float
    """This one, p90 and p95 are given at any number of samples, as everybody's tables do; `percentiles` is stricter."""
    p90_s: float
    p95_s: float
    p99_s: float | None
    """None below P99_NEEDS_SAMPLES samples."""
    max_s: float
    percentiles: Mapping[float, float | None]
    """Seconds by percentile (99.0), those that were asked for; None below `samples_needed` samples."""

    def trusted_s(self, percentile: float) -> float | None:
        """50, 90, 95, 99 or one that was asked for; None below `samples_needed` samples."""
        always = {50.0: self.p50_s, 90.0: self.p90_s, 95.0: self.p95_s, 99.0: self.p99_s}
        enough = self.samples >= samples_needed(percentile)
        return {**always, **self.percentiles}[percentile] if enough else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Summary of one speed over requests, in tokens per second. The slow side is the bad one, hence p10."""

    samples: int
    mean_per_s: float
    p10_per_s: float
    p50_per_s: float
    p90_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Requests that a cap on concurrency delayed."""

    requests: int
    """At least one."""
    mean_s: float
    """Over those that were delayed."""
    max_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Latency targets of one request; None: no target. All that are set must be met."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def met_by(self, record: RequestRecord) -> bool:
        """True if the request was answered within every target. One token meets any TPOT."""
        return record.outcome is Outcome.OK and all(self.targets_met(record).values())

    def targets_met(self, record: RequestRecord) -> dict[str, bool]:
        """For each target that is set (`ttft`, `tpot`, `e2el`), whether an answer met it; a failed request meets none."""
        pairs = {
            "ttft": (self.ttft_s, record.ttft_s),
            "tpot": (self.tpot_s, record.tpot_s),
            "e2el": (self.e2e_s, record.e2e_s),
        }
        answered = record.outcome is Outcome.OK
        return {
            name: answered and (value_s is None or value_s <= target_s)
            for name, (target_s, value_s) in pairs.items()
            if target_s is not None
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """All numbers of a run."""

    duration_s: float
    completed: int
    failed: int
    rejected: int
    """Of the failed: the server said that it was full."""
    cancelled: int
    measured: int
    """Requests that latency and attainment are about: neither warm-up nor cool-down nor cancelled."""
    outcomes: Mapping[str, int]
    """Requests by outcome, only those that occurred."""
    input_tokens: int
    """Of completed requests, like all token counts; asked for, where the server did not count."""
    output_tokens: int
    cached_tokens: int | None
    """None if no answer told."""
    cache_hit_ratio: float | None
    """Cached tokens / prompt tokens of the measured answers that told; None if none did."""
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    goodput_per_s: float | None
    """Requests that met the targets, per second; None without targets."""
    attainment: float | None
    """Share of the measured requests that met every target, failed ones counted as missed; None without targets."""
    attainment_by_target: Mapping[str, float]
    """The same for each target alone: ttft, tpot, e2el; only those that are set."""
    steady: Steady | None
    """Throughput while requests were being sent; None if that time was too short to say."""
    peak_output_tokens_per_s: float
    """Most tokens in any one second of the run; all requests."""
    peak_concurrent: int
    mean_concurrent: float
    held: Held | None
    """None: no request was delayed by a cap on concurrency."""
    ttft: Distribution | None
    """None without a sample, as below."""
    ttst: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    chunk_gap: Distribution | None
    e2e: Distribution | None
    prefill_tokens_per_s: Rates | None
    """Prompt tokens / TTFT of each measured answer: what its client saw of the prefill, waiting and cache included."""
    user_tokens_per_s: Rates | None
    """1 / TPOT of each measured answer: how fast its client saw text grow."""
    tokens_per_chunk: float | None
    counted_by: Mapping[str, int]
    """Completed requests by the source of their token count."""
    wrong_output_lengths: int
    """Completed requests with another number of tokens than was asked for."""
    wrong_input_lengths: int
    """Completed requests whose prompt the server counted differently."""


def samples_needed(percentile: float) -> int:
    """Fewest samples for a percentile (0 to 100, both excluded): two beyond it, so 200 for p99 and 40 for p95.

    With fewer it would be the extreme sample or a line drawn to it. Raises ValueError outside the range.
    """
    if not 0 < percentile < 100:
        raise ValueError(f"percentile {percentile:g}: must be above 0 and below 100")
    beyond_percent = min(percentile, 100 - percentile)
    return math.ceil(round(200 / beyond_percent, 6))  # 100 - 99.9 is a little less than 0.1


def parse_percentiles(text: str) -> tuple[float, ...]:
    """`50,90,99.9` to numbers, sorted. Raises ValueError that says what is allowed."""
    try:
        found = sorted({float(part) for part in text.split(",")})
        for percentile in found:
            samples_needed(percentile)
    except ValueError as error:
        raise ValueError(f"{text!r}: must be numbers above 0 and below 100 such as 50,90,99.9") from error
    return tuple(found)


def distribution(samples_s: Iterable[float | None], percentiles: Sequence[float] = PERCENTILES) -> Distribution | None:
    """Summary of the samples that are not None; None if there are none."""
    values = np.fromiter((sample for sample in samples_s if sample is not None), dtype=np.float64)
    if values.size == 0:
        return None
    p50, p90, p95, p99, *asked = (float(value) for value in np.percentile(values, [50, 90, 95, 99, *percentiles]))
    return Distribution(
        samples=values.size,
        mean_s=float(values.mean()),
        std_s=float(values.std()),
        p50_s=p50,
        p90_s=p90,
        p95_s=p95,
        p99_s=p99 if values.size >= P99_NEEDS_SAMPLES else None,
        max_s=float(values.max()),
        percentiles={
            percentile: value if values.size >= samples_needed(percentile) else None
            for percentile, value in zip(percentiles, asked, strict=True)
        },
    )


def summarize(
    records: Sequence[RequestRecord], slo: Slo | None = None, percentiles: Sequence[float] = PERCENTILES
) -> Summary:
    """The numbers of a run. Raises ValueError without records."""
    if not records:
        raise ValueError("a run without requests has no numbers")
    first_s, last_s = min(record.sent_s for record in records), max(record.end_s for record in records)
    duration_s = max(last_s - first_s, 1e-9)
    done = [record for record in records if record.outcome is Outcome.OK]
    timed = [record for record in done if record.measured]
    counted = [record for record in records if record.measured and record.outcome is not Outcome.CANCELLED]
    input_tokens = sum(record.prompt_tokens for record in done)
    output_tokens = sum(record.output_tokens for record in done)
    chunks = sum(len(record.chunk_s) for record in done)
    cached = [record.cached_tokens for record in done if record.cached_tokens is not None]
    good = [] if slo is None else [record for record in records if slo.met_by(record)]
    return Summary(
        duration_s=duration_s,
        completed=len(done),
        failed=sum(record.outcome.failed for record in records),
        rejected=sum(record.outcome is Outcome.REJECTED for record in records),
        cancelled=sum(record.outcome is Outcome.CANCELLED for record in records),
        measured=len(counted),
        outcomes=dict(sorted(Counter(record.outcome.value for record in records).items())),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cached_tokens=sum(cached) if cached else None,
        cache_hit_ratio=cached_share(timed),
        requests_per_s=len(done) / duration_s,
        output_tokens_per_s=output_tokens / duration_s,
        total_tokens_per_s=(input_tokens + output_tokens) / duration_s,
        goodput_per_s=None if slo is None else len(good) / duration_s,
        attainment=None if slo is None or not counted else sum(map(slo.met_by, counted)) / len(counted),
        attainment_by_target={} if slo is None else _attainment_by_target(counted, slo),
        steady=steady(records, None if slo is None else good),
        peak_output_tokens_per_s=peak_tokens_per_s(records, duration_s),
        peak_concurrent=peak_concurrent(records),
        mean_concurrent=sum(record.end_s - record.sent_s for record in records) / duration_s,
        held=_held(records),
        ttft=distribution((record.ttft_s for record in timed), percentiles),
        ttst=distribution((record.ttst_s for record in timed), percentiles),
        tpot=distribution((record.tpot_s for record in timed), percentiles),
        itl=distribution((gap_s for record in timed for gap_s in record.token_gaps_s()), percentiles),
        chunk_gap=distribution((gap_s for record in timed for gap_s in record.chunk_gaps_s()), percentiles),
        e2e=distribution((record.e2e_s for record in timed), percentiles),
        prefill_tokens_per_s=_rates((record.prompt_tokens, record.ttft_s) for record in timed),
        user_tokens_per_s=_rates((1, record.tpot_s) for record in timed),
        tokens_per_chunk=output_tokens / chunks if chunks else None,
        counted_by=dict(sorted(Counter(record.counted_by for record in done).items())),
        wrong_output_lengths=sum(record.output_tokens != record.asked_output_tokens for record in done),
        wrong_input_lengths=sum(map(_counted_differently, done)),
    )


def cached_share(answers: Iterable[RequestRecord]) -> float | None:
    """Cached tokens / prompt tokens over the answers whose server told; None if none did."""
    told = [(record.cached_tokens, record.prompt_tokens) for record in answers if record.cached_tokens is not None]
    prompt_tokens = sum(prompt for _, prompt in told)
    return sum(cached for cached, _ in told) / prompt_tokens if prompt_tokens else None


def _attainment_by_target(counted: Sequence[RequestRecord], slo: Slo) -> dict[str, float]:
    met: Counter[str] = Counter()
    for record in counted:
        met.update({name: int(is_met) for name, is_met in slo.targets_met(record).items()})
    return {name: n_met / len(counted) for name, n_met in met.items()}


def _held(records: Sequence[RequestRecord]) -> Held | None:
    held_s = [record.held_s for record in records if record.held_s > 0]
    if not held_s:
        return None
    return Held(requests=len(held_s), mean_s=sum(held_s) / len(held_s), max_s=max(held_s))


def _rates(amounts: Iterable[tuple[int, float | None]]) -> Rates | None:
    """Of tokens and the seconds they took; what took no time, or no token, is left out."""
    values = np.array([tokens / spent_s for tokens, spent_s in amounts if tokens and spent_s])
    if values.size == 0:
        return None
    p10, p50, p90 = (float(value) for value in np.percentile(values, [10, 50, 90]))
    return Rates(samples=values.size, mean_per_s=float(values.mean()), p10_per_s=p10, p50_per_s=p50, p90_per_s=p90)


def _counted_differently(record: RequestRecord) -> bool:
    """True if both sides counted the prompt, and not the same."""
    asked, counted = record.asked_input_tokens, record.input_tokens
    return asked is not None and counted is not None and asked != counted
