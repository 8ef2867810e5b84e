"""The result of a run as a console table in vLLM's words. Pure."""

from collections.abc import Iterator, Sequence

import numpy as np

from common.units import format_bytes
from loadgen.output.warnings import warnings
from loadgen.results.health import GeneratorHealth
from loadgen.results.memory_use import memory_use
from loadgen.results.metrics import Distribution, Summary, samples_needed
from loadgen.results.records import RequestRecord
from loadgen.results.result import Result, RunFacts
from loadgen.results.timeline import ServerSample
from loadgen.stats.resampling import Interval

_WIDTH = 78
_ERRORS_SHOWN = 3
_LATENCIES = (
    ("ttft", "Time to First Token"),
    ("ttst", "Time to Second Token"),
    ("tpot", "Time per Output Token (excl. 1st token)"),
    ("itl", "Inter-token Latency"),
    ("chunk_gap", "Inter-chunk Latency"),
    ("e2e", "End-to-end Latency"),
)
_JSON_NAMES = {"e2e": "e2el"}
Row = tuple[str, str]


def table(result: Result) -> str:
    """The console report; ends with the first errors and the warnings, if there are any."""
    summary = result.summary
    lines = [_rule("=", " Serving Benchmark Result ")]
    lines += map(_row, [*_count_rows(result.facts, summary, result.records), *_throughput_rows(summary)])
    for name, title in _LATENCIES:
        shown: Distribution | None = getattr(summary, name)
        if shown is not None and (name != "chunk_gap" or (summary.tokens_per_chunk or 1) > 1.005):
            lines += [_rule("-", title), *map(_row, _latency_rows(name, shown, result))]
    if phases := list(_phase_rows(result.records)):
        lines += [_rule("-", "Time to First Token by Phase"), *map(_row, phases)]
    if memory := list(_memory_rows(result.server.samples)):
        lines += [_rule("-", "Memory, All Workers"), *map(_row, memory)]
    lines += [_rule("-", "Generator"), *map(_row, _health_rows(result.health)), "=" * _WIDTH]
    errors = [f"{record.outcome}: {record.detail}" for record in result.records if record.outcome.failed]
    lines += [f"error: {text}" for text in list(dict.fromkeys(errors))[:_ERRORS_SHOWN]]
    lines += [f"warning: {text}" for text in warnings(result)]
    return "\n".join(lines)


def _count_rows(facts: RunFacts, summary: Summary, records: Sequence[RequestRecord]) -> Iterator[Row]:
    yield "Successful requests", str(summary.completed)
    yield "Failed requests", str(summary.failed)
    for name, count in summary.outcomes.items():
        if name not in ("ok", "cancelled"):
            yield f"  {name}", str(count)
    if summary.cancelled:
        yield "Cancelled requests", str(summary.cancelled)
    if summary.measured != summary.completed + summary.failed:
        yield "Requests that count in latency", str(summary.measured)
    if facts.request_rate is not None:
        of_turns = facts.settings.get("turns_by") == "answers" and any(record.turn for record in records)
        what = "Conversations started per second" if of_turns else "Request rate configured (RPS)"
        yield what, f"{facts.request_rate:.2f}"
    if facts.max_concurrency is not None:
        yield "Maximum request concurrency", str(facts.max_concurrency)
    if summary.held is not None:
        held = summary.held
        yield "Requests held by that maximum", f"{held.requests}, {_ms(held.mean_s)} ms each, most {_ms(held.max_s)}"
    yield "Benchmark duration (s)", f"{summary.duration_s:.2f}"
    yield "Total input tokens", str(summary.input_tokens)
    yield "Total generated tokens", str(summary.output_tokens)
    if summary.cached_tokens is not None:
        share = summary.cached_tokens / max(1, summary.input_tokens)
        yield "Cached input tokens", f"{summary.cached_tokens} ({share:.1%})"


def _throughput_rows(summary: Summary) -> Iterator[Row]:
    yield "Request throughput (req/s)", f"{summary.requests_per_s:.2f}"
    if summary.goodput_per_s is not None and summary.attainment is not None:
        yield "Request goodput (req/s)", f"{summary.goodput_per_s:.2f}"
        parts = ", ".join(f"{name} {share:.1%}" for name, share in summary.attainment_by_target.items())
        yield "Requests that met all targets", f"{summary.attainment:.1%} ({parts})"
    yield "Output token throughput (tok/s)", f"{summary.output_tokens_per_s:.2f}"
    yield "Peak output token throughput (tok/s)", f"{summary.peak_output_tokens_per_s:.2f}"
    yield "Peak concurrent requests", str(summary.peak_concurrent)
    yield "Mean concurrent requests", f"{summary.mean_concurrent:.2f}"
    yield "Total Token throughput (tok/s)", f"{summary.total_tokens_per_s:.2f}"
    if summary.steady is not None:
        steady = summary.steady
        yield (
            "Steady: until the last arrival (req/s, tok/s)",
            f"{steady.requests_per_s:.2f}, {steady.output_tokens_per_s:.2f}",
        )


def _latency_rows(name: str, shown: Distribution, result: Result) -> Iterator[Row]:
    key = _JSON_NAMES.get(name, name)
    unit = f"{key.upper().replace('_', ' ')} (ms)"
    yield f"Mean {unit}", _ms(shown.mean_s) + _interval(result.intervals.get(f"mean_{key}_ms"))
    for percentile, value_s in shown.percentiles.items():
        title = "Median" if percentile == 50 else f"P{percentile:g}"
        if value_s is None:
            yield f"{title} {unit}", f"- ({shown.samples} samples, needs {samples_needed(percentile)})"
        else:
            yield f"{title} {unit}", _ms(value_s) + _interval(result.intervals.get(f"p{percentile:g}_{key}_ms"))


def _phase_rows(records: Sequence[RequestRecord]) -> Iterator[Row]:
    """Means over the measured answers that tell."""
    told = [record for record in records if record.measured and record.phases_ms and record.ttft_s is not None]
    if not told:
        return
    known_ms = 0.0
    for phase in told[0].phases_ms:
        mean_ms = float(np.mean([record.phases_ms.get(phase, 0.0) for record in told]))
        known_ms += mean_ms
        yield f"Mean {phase.replace('_', ' ')} (ms)", f"{mean_ms:.2f}"
    ttft_ms = float(np.mean([(record.ttft_s or 0.0) * 1e3 for record in told]))
    yield "Mean gateway, network, client (ms)", f"{ttft_ms - known_ms:.2f}"


def _memory_rows(samples: Sequence[ServerSample]) -> Iterator[Row]:
    """Owners that had some."""
    for use in memory_use(samples):
        if use.peak_bytes:
            name = f"Mean, peak of {use.owner.replace('_', ' ')} ({use.tier})"
            yield name, f"{format_bytes(round(use.mean_bytes))}, {format_bytes(use.peak_bytes)}"


def _health_rows(health: GeneratorHealth) -> Iterator[Row]:
    yield "Median, P99, max send lag (ms)", ", ".join(map(_ms, (health.lag_p50_s, health.lag_p99_s, health.lag_max_s)))
    processes = "" if health.processes == 1 else f", the busiest of {health.processes} processes"
    yield "CPU (share of one core)", f"{health.cpu_share:.0%}{processes}"
    if health.cpu_us_per_token is not None:
        yield "CPU per token (us)", f"{health.cpu_us_per_token:.1f}"


def _interval(found: Interval | None) -> str:
    return "" if found is None else f"   [{found.low:.2f}, {found.high:.2f}]"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _row(row: Row) -> str:
    return f"{row[0] + ':':<46} {row[1]}"


def _rule(fill: str, title: str) -> str:
    return title.center(_WIDTH, fill)
