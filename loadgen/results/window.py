"""Which part of a run counts for latency. Pure."""

from collections.abc import Iterable
from dataclasses import replace

from loadgen.results.records import RequestRecord


def mark_measured(records: Iterable[RequestRecord], warmup_s: float, cooldown_s: float) -> list[RequestRecord]:
    """Records in the order of their numbers; those due in the first or in the last seconds of arrivals do not count."""
    ordered = sorted(records, key=lambda record: record.index)
    last_s = max((record.planned_s for record in ordered), default=0.0)
    return [
        record if warmup_s <= record.planned_s <= last_s - cooldown_s else replace(record, measured=False)
        for record in ordered
    ]
