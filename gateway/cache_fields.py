"""What one process keeps for reuse, for /status. Pure."""

from collections.abc import Mapping
from typing import Any  # Any: JSON

from common.messages.liveness import Report
from gateway.series import by_label

_TOTALS = {
    "missed_tokens": "missed_tokens_total",
    "evicted_blocks": "evicted_blocks_total",
    "spilled_blocks": "spilled_blocks_total",
    "declined_blocks": "declined_blocks_total",
    "load_failures": "load_failures_total",
}


def cache_fields(report: Report | None) -> dict[str, Any]:
    """Blocks and bytes by tier, hits by where they came from, bytes moved by direction, age of the oldest pin.

    The same fields whatever the process reported; what it does not count is 0 or empty.
    """
    counters: Mapping[str, float] = {} if report is None else report.counters
    gauges: Mapping[str, float] = {} if report is None else report.gauges
    return {
        "cached_blocks": int(gauges.get("cached_blocks", 0)),
        "pinned_blocks": int(gauges.get("pinned_blocks", 0)),
        "oldest_pin_ms": gauges.get("oldest_pin_ms", 0.0),
        "blocks_by_tier": _whole(by_label(gauges, "blocks", "tier")),
        "bytes_by_tier": _whole(by_label(gauges, "bytes", "tier")),
        "hit_tokens_by_tier": _whole(by_label(counters, "hit_tokens_total", "tier")),
        "moved_bytes_by_direction": _whole(by_label(counters, "kv_bytes_total", "direction")),
        "copies_by_mode": _whole(by_label(counters, "kv_copies_total", "mode")),
        **{name: int(counters.get(key, 0)) for name, key in _TOTALS.items()},
    }


def _whole(values: Mapping[str, float]) -> dict[str, int]:
    return {name: int(value) for name, value in values.items()}
