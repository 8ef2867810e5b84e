"""The numbers of a run as one JSON object: vLLM's keys first, then ours. Pure.

Requests, samples of the server and what is needed to read the run back are next to it: `loadgen.output.files`.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any  # Any: JSON

from loadgen.output.warnings import warnings
from loadgen.results.buckets import Bucket, by_group, by_input_length, by_turn, by_worker, phases_served
from loadgen.results.memory_use import MemoryUse, memory_use, memory_use_by_worker
from loadgen.results.metrics import Distribution
from loadgen.results.records import RequestRecord
from loadgen.results.result import Result

SCHEMA_VERSION = 2
"""Of `result.json` and the files beside it. 1 had the requests inside."""

_LATENCIES = {"ttft": "ttft", "ttst": "ttst", "tpot": "tpot", "itl": "itl", "chunk_gap": "chunk_gap", "e2e": "e2el"}
"""Field of the summary: name in the keys."""
_ALWAYS = (50.0, 90.0, 95.0, 99.0)


def to_json(result: Result) -> dict[str, Any]:
    """The run as one JSON object: vLLM's keys first, then ours. Latencies in ms under `*_ms`, arrays in seconds."""
    found = _vllm_json(result)
    for field, name in _LATENCIES.items():
        found |= _latency_json(name, getattr(result.summary, field))
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
    """A percentile is null below the number of samples that it needs."""
    if shown is None:
        return {f"{key}_{name}_ms": None for key in ("mean", "median", "std", "p50", "p90", "p95", "p99", "max")}
    percentiles = {
        f"p{percent:g}": shown.trusted_s(percent) for percent in dict.fromkeys((*_ALWAYS, *shown.percentiles))
    }
    values_s = {
        "mean": shown.mean_s,
        "median": percentiles["p50"],
        "std": shown.std_s,
        **percentiles,
        "max": shown.max_s,
    }
    return {f"{key}_{name}_ms": _ms(value_s) for key, value_s in values_s.items()}


def _arrays_json(result: Result) -> dict[str, Any]:
    records = sorted(result.records, key=lambda record: record.index)
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
        "workload": facts.workload,
        "workload_source": facts.workload_source,
        "notes": list(facts.notes),
        "rejected": summary.rejected,
        "cancelled": summary.cancelled,
        "measured": summary.measured,
        "attainment": summary.attainment,
        "attainment_by_target": dict(summary.attainment_by_target),
        "failed_share": summary.failed / max(1, summary.failed + summary.completed),
        "cache_hit_ratio": summary.cache_hit_ratio,
        "steady": None if summary.steady is None else asdict(summary.steady),
        "held": None if summary.held is None else asdict(summary.held),
        "prefill_tokens_per_s": None if summary.prefill_tokens_per_s is None else asdict(summary.prefill_tokens_per_s),
        "user_tokens_per_s": None if summary.user_tokens_per_s is None else asdict(summary.user_tokens_per_s),
        "outcomes": dict(summary.outcomes),
        "cached_tokens": summary.cached_tokens,
        "mean_concurrent_requests": summary.mean_concurrent,
        "tokens_per_chunk": summary.tokens_per_chunk,
        "counted_by": dict(summary.counted_by),
        "wrong_output_lengths": summary.wrong_output_lengths,
        "wrong_input_lengths": summary.wrong_input_lengths,
        "send_lag_ms": {"p50": health.lag_p50_s * 1e3, "p99": health.lag_p99_s * 1e3, "max": health.lag_max_s * 1e3},
        "generator": {
            "allowed_lag_ms": None if health.allowed_lag_s is None else health.allowed_lag_s * 1e3,
            "late": health.late,
            "processes": health.processes,
            "cpu_share": health.cpu_share,
            "cpu_us_per_token": health.cpu_us_per_token,
        },
        "saturated": None if result.saturation is None else result.saturated,
        "leaked": None if result.server.leak_check is None else result.leaked,
        "intervals": {name: [found.low, found.high] for name, found in result.intervals.items()},
        "memory": [_memory_json(use) for use in memory_use(result.server.samples)],
        "memory_by_worker": [
            {"worker": use.worker} | _memory_json(use) for use in memory_use_by_worker(result.server.samples)
        ],
        "warnings": warnings(result),
        **_parts_json(result.records),
    }


def _parts_json(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """Numbers by turn, prompt length, group and worker, each only where there is more than one."""
    found: dict[str, list[dict[str, Any]]] = {
        "by_turn": [{"turn": part.key} | _part_json(part) for part in by_turn(records)],
        "by_input_length": [
            {"min_input_tokens": part.key[0], "max_input_tokens": part.key[1]} | _part_json(part)
            for part in by_input_length(records)
        ],
        "by_group": [{"group": part.key} | _part_json(part) for part in by_group(records)],
    }
    workers = {phase: by_worker(records, phase) for phase in phases_served(records)}
    if any(len(parts) > 1 for parts in workers.values()):
        found["by_worker"] = [
            {"phase": phase, "worker": part.key} | _part_json(part)
            for phase, parts in workers.items()
            for part in parts
        ]
    return {name: parts for name, parts in found.items() if len(parts) > 1}


def _memory_json(use: MemoryUse) -> dict[str, Any]:
    return {"tier": use.tier, "owner": use.owner, "mean_bytes": use.mean_bytes, "peak_bytes": use.peak_bytes}


def _part_json(part: Bucket[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "completed": part.answered,
        "failed": part.failed,
        "mean_input_tokens": part.mean_input_tokens,
        "mean_output_tokens": part.mean_output_tokens,
        "cache_hit_ratio": part.cached_share,
    }
    for name, shown in (("ttft", part.ttft), ("tpot", part.tpot)):
        found[f"mean_{name}_ms"] = None if shown is None else _ms(shown.mean_s)
        for percent in (50.0, 90.0, 99.0):
            found[f"p{percent:g}_{name}_ms"] = None if shown is None else _ms(shown.trusted_s(percent))
    return found


def _ms(value_s: float | None) -> float | None:
    return None if value_s is None else value_s * 1e3
