"""Names of the measured numbers in result.json, known before anything is measured. Pure.

A test holds them against a result: no name is missing, and none is dead. Settings and facts of the host are no
measurement and not among them.
"""

import re
from collections.abc import Collection
from dataclasses import fields

from loadgen.results.metrics import PERCENTILES, Held, Rates
from loadgen.results.records import Outcome
from loadgen.results.throughput import Steady

LATENCIES = ("ttft", "ttst", "tpot", "itl", "chunk_gap", "e2el")
_COLUMNS = ("mean", "median", "std", "max")
_PLAIN = (
    *("num_prompts", "duration", "completed", "failed", "rejected", "cancelled", "measured", "failed_share"),
    *("total_input_tokens", "total_output_tokens", "cached_tokens", "cache_hit_ratio", "tokens_per_chunk"),
    *("request_throughput", "request_goodput", "output_throughput", "total_token_throughput", "attainment"),
    *("max_output_tokens_per_s", "max_concurrent_requests", "mean_concurrent_requests"),
    *("wrong_output_lengths", "wrong_input_lengths"),
)
_PARTS = {
    "attainment_by_target": ("ttft", "tpot", "e2el"),
    "outcomes": tuple(outcome.value for outcome in Outcome),
    "send_lag_ms": ("p50", "p99", "max"),
    "generator": ("allowed_lag_ms", "processes", "cpu_share", "cpu_us_per_token"),
    "steady": tuple(field.name for field in fields(Steady)),
    "held": tuple(field.name for field in fields(Held)),
    "prefill_tokens_per_s": tuple(field.name for field in fields(Rates)),
    "user_tokens_per_s": tuple(field.name for field in fields(Rates)),
}
_PERCENTILE = re.compile(rf"p(\d\d?(?:\.\d+)?)_(?:{'|'.join(LATENCIES)})_ms")


def known_names(percentiles: Collection[float] = PERCENTILES) -> frozenset[str]:
    """Every name of a run that was asked for these percentiles; a number inside another is `send_lag_ms.p99`."""
    columns = (*_COLUMNS, *(f"p{percentile:g}" for percentile in {*PERCENTILES, *percentiles}))
    latencies = {f"{column}_{name}_ms" for column in columns for name in LATENCIES}
    return frozenset({*_PLAIN, *latencies, *(f"{name}.{inner}" for name in _PARTS for inner in _PARTS[name])})


def percentile_of(name: str) -> float | None:
    """The percentile of a latency that a name asks for (`p99.9_ttft_ms`, `median_ttft_ms`); None: it asks for none."""
    match = _PERCENTILE.fullmatch(name.replace("median_", "p50_", 1))
    return None if match is None or not 0 < float(match[1]) < 100 else float(match[1])
