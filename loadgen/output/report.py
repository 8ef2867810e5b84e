"""The result of a run as a console table in vLLM's words and as JSON with vLLM's keys. Pure."""

import math
from typing import Any  # Any: JSON

from loadgen.results.health import GeneratorHealth
from loadgen.results.metrics import P99_NEEDS_SAMPLES, Distribution
from loadgen.results.records import RequestRecord
from loadgen.results.result import Result

SCHEMA_VERSION = 1
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


def warnings(result: Result) -> list[str]:
    """What a reader of the numbers must know, one sentence each."""
    summary, found = result.summary, result.health.warnings
    if summary.cached_tokens:
        share = summary.cached_tokens / max(1, summary.input_tokens)
        found.append(f"{share:.0%} of the input came from the server's prefix cache; another --seed sends new prompts")
    if summary.wrong_output_lengths:
        found.append(
            f"{summary.wrong_output_lengths} of {summary.completed} answers had another length than asked for: "
            "the server does not know ignore_eos, or the context is too short"
        )
    if summary.wrong_input_lengths and result.facts.endpoint == "completions":
        found.append(f"{summary.wrong_input_lengths} prompts were counted differently by the server than sent")
    return found


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


def to_json(result: Result) -> dict[str, Any]:
    """The run as one JSON object: vLLM's keys first, then ours. Latencies in ms under `*_ms`, arrays in seconds."""
    found = _vllm_json(result)
    for name, _ in _LATENCIES:
        found |= _latency_json(_JSON_NAMES.get(name, name), getattr(result.summary, name))
    return found | _arrays_json(result) | _own_json(result)


def _vllm_json(result: Result) -> dict[str, Any]:
    facts, summary = result.facts, result.summary
    rate = facts.request_rate
    return {
        "date": facts.date,
        "backend": "openai" if facts.endpoint == "completions" else "openai-chat",
        "model_id": facts.model,
        "tokenizer_id": facts.model,
        "num_prompts": facts.num_prompts,
        "request_rate": "inf" if rate is None or math.isinf(rate) else rate,
        "burstiness": facts.burstiness,
        "max_concurrency": facts.max_concurrency,
        "duration": summary.duration_s,
        "completed": summary.completed,
        "failed": summary.failed,
        "total_input_tokens": summary.input_tokens,
        "total_output_tokens": summary.output_tokens,
        "request_throughput": summary.requests_per_s,
        "request_goodput": summary.goodput_per_s,
        "output_throughput": summary.output_tokens_per_s,
        "total_token_throughput": summary.total_tokens_per_s,
        "max_output_tokens_per_s": summary.peak_output_tokens_per_s,
        "max_concurrent_requests": summary.peak_concurrent,
    }


def _latency_json(name: str, shown: Distribution | None) -> dict[str, Any]:
    if shown is None:
        return {f"{key}_{name}_ms": None for key in ("mean", "median", "std", "p50", "p90", "p95", "p99", "max")}
    values_s = {
        "mean": shown.mean_s,
        "median": shown.p50_s,
        "std": shown.std_s,
        "p50": shown.p50_s,
        "p90": shown.p90_s,
        "p95": shown.p95_s,
        "p99": shown.p99_s,
        "max": shown.max_s,
    }
    return {f"{key}_{name}_ms": None if value_s is None else value_s * 1e3 for key, value_s in values_s.items()}


def _arrays_json(result: Result) -> dict[str, Any]:
    records = _in_order(result)
    return {
        "input_lens": [record.prompt_tokens for record in records],
        "output_lens": [record.output_tokens for record in records],
        "ttfts": [record.ttft_s for record in records],
        "itls": [record.token_gaps_s() for record in records],
        "start_times": [record.sent_s for record in records],
        "errors": [record.detail for record in records],
    }


def _own_json(result: Result) -> dict[str, Any]:
    facts, summary, health = result.facts, result.summary, result.health
    return {
        "schema_version": SCHEMA_VERSION,
        "command": list(facts.command),
        "url": facts.url,
        "seed": facts.seed,
        "arrival": facts.arrival,
        "settings": dict(facts.settings),
        "host": dict(facts.host),
        "cancelled": summary.cancelled,
        "outcomes": dict(summary.outcomes),
        "cached_tokens": summary.cached_tokens,
        "mean_concurrent_requests": summary.mean_concurrent,
        "tokens_per_chunk": summary.tokens_per_chunk,
        "counted_by": dict(summary.counted_by),
        "wrong_output_lengths": summary.wrong_output_lengths,
        "wrong_input_lengths": summary.wrong_input_lengths,
        "send_lag_ms": {"p50": health.lag_p50_s * 1e3, "p99": health.lag_p99_s * 1e3, "max": health.lag_max_s * 1e3},
        "generator": {
            "allowed_lag_ms": health.allowed_lag_s * 1e3,
            "cpu_share": health.cpu_share,
            "cpu_us_per_token": health.cpu_us_per_token,
        },
        "warnings": warnings(result),
        "requests": [_request_json(record) for record in _in_order(result)],
    }


def _in_order(result: Result) -> list[RequestRecord]:
    return sorted(result.records, key=lambda record: record.index)


def _request_json(record: RequestRecord) -> dict[str, Any]:
    return {
        "index": record.index,
        "request_id": record.request_id,
        "outcome": record.outcome.value,
        "http_status": record.http_status,
        "planned_s": record.planned_s,
        "sent_s": record.sent_s,
        "end_s": record.end_s,
        "ttft_s": record.ttft_s,
        "tpot_s": record.tpot_s,
        "e2e_s": record.e2e_s,
        "input_tokens": record.input_tokens,
        "output_tokens": record.output_tokens,
        "cached_tokens": record.cached_tokens,
        "finish_reason": record.finish_reason,
    }
