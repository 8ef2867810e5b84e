"""The result of a run as a console table in vLLM's words. Pure."""

from loadgen.output.result_json import to_json
from loadgen.output.warnings import warnings
from loadgen.results.health import GeneratorHealth
from loadgen.results.metrics import P99_NEEDS_SAMPLES, Distribution
from loadgen.results.result import Result

__all__ = ["table", "to_json", "warnings"]

_WIDTH = 62
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


def table(result: Result) -> str:
    """The console report; ends with the first errors and the warnings, if there are any."""
    facts, summary = result.facts, result.summary
    rows: list[tuple[str, str]] = [
        ("Successful requests", str(summary.completed)),
        ("Failed requests", str(summary.failed)),
    ]
    rows += [(f"  {name}", str(count)) for name, count in summary.outcomes.items() if name not in ("ok", "cancelled")]
    if summary.cancelled:
        rows.append(("Cancelled requests", str(summary.cancelled)))
    if facts.request_rate is not None:
        rows.append(("Request rate configured (RPS)", f"{facts.request_rate:.2f}"))
    if facts.max_concurrency is not None:
        rows.append(("Maximum request concurrency", str(facts.max_concurrency)))
    rows += [
        ("Benchmark duration (s)", f"{summary.duration_s:.2f}"),
        ("Total input tokens", str(summary.input_tokens)),
        ("Total generated tokens", str(summary.output_tokens)),
    ]
    if summary.cached_tokens is not None:
        rows.append(("Cached input tokens", str(summary.cached_tokens)))
    rows.append(("Request throughput (req/s)", f"{summary.requests_per_s:.2f}"))
    if summary.goodput_per_s is not None:
        rows.append(("Request goodput (req/s)", f"{summary.goodput_per_s:.2f}"))
    rows += [
        ("Output token throughput (tok/s)", f"{summary.output_tokens_per_s:.2f}"),
        ("Peak output token throughput (tok/s)", f"{summary.peak_output_tokens_per_s:.2f}"),
        ("Peak concurrent requests", str(summary.peak_concurrent)),
        ("Mean concurrent requests", f"{summary.mean_concurrent:.2f}"),
        ("Total Token throughput (tok/s)", f"{summary.total_tokens_per_s:.2f}"),
    ]
    lines = [_rule("=", " Serving Benchmark Result "), *map(_row, rows)]
    for name, title in _LATENCIES:
        shown: Distribution | None = getattr(summary, name)
        if shown is not None and (name != "chunk_gap" or (summary.tokens_per_chunk or 1) > 1.005):
            lines += [_rule("-", title), *map(_row, _latency_rows(name, shown))]
    lines += [_rule("-", "Generator"), *map(_row, _health_rows(result.health)), "=" * _WIDTH]
    errors = [f"{record.outcome}: {record.detail}" for record in result.records if record.outcome.failed]
    lines += [f"error: {text}" for text in list(dict.fromkeys(errors))[:_ERRORS_SHOWN]]
    lines += [f"warning: {text}" for text in warnings(result)]
    return "\n".join(lines)


def _latency_rows(name: str, shown: Distribution) -> list[tuple[str, str]]:
    unit = f"{_JSON_NAMES.get(name, name).upper().replace('_', ' ')} (ms)"
    p99 = f"- ({shown.samples} samples, needs {P99_NEEDS_SAMPLES})" if shown.p99_s is None else _ms(shown.p99_s)
    return [
        (f"Mean {unit}", _ms(shown.mean_s)),
        (f"Median {unit}", _ms(shown.p50_s)),
        (f"P90 {unit}", _ms(shown.p90_s)),
        (f"P99 {unit}", p99),
    ]


def _health_rows(health: GeneratorHealth) -> list[tuple[str, str]]:
    rows = [
        ("P99 send lag (ms)", _ms(health.lag_p99_s)),
        ("Max send lag (ms)", _ms(health.lag_max_s)),
        ("CPU (share of one core)", f"{health.cpu_share:.0%}"),
    ]
    if health.cpu_us_per_token is not None:
        rows.append(("CPU per token (us)", f"{health.cpu_us_per_token:.1f}"))
    return rows


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _row(row: tuple[str, str]) -> str:
    return f"{row[0] + ':':<42} {row[1]}"


def _rule(fill: str, title: str) -> str:
    return title.center(_WIDTH, fill)
