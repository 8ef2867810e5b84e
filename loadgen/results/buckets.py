"""The same numbers for parts of a run: by turn, prompt length, group and worker. Pure.

An average over two kinds of requests describes neither; these tables show where kinds differ. They count what the
summary's latencies count: measured requests that were not cancelled, latency over the answered ones.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loadgen.results.metrics import cached_share, distribution
from loadgen.results.records import Outcome, RequestRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """One part of a run."""

    name: str
    requests: int
    """Answered and failed."""
    failed: int
    ttft_p50_s: float | None
    """None: nothing was answered."""
    ttft_p90_s: float | None
    """None below 20 answers, as a percentile of a few samples is one of them."""
    ttft_p99_s: float | None
    """None below 200 answers."""
    tpot_p50_s: float | None
    cached_share: float | None
    """Cached tokens / prompt tokens of the answers that told; None if none did."""


def by_turn(records: Sequence[RequestRecord]) -> list[Bucket]:
    """One for each place in a conversation, named by it, from 0."""
    return _buckets((record.turn, str(record.turn), record) for record in records)


def by_input_length(records: Sequence[RequestRecord]) -> list[Bucket]:
    """Prompt tokens between powers of two (`128-255`), only those that occur; `0` where nobody counted."""
    return _buckets((bits := record.prompt_tokens.bit_length(), _range(bits), record) for record in records)


def by_group(records: Sequence[RequestRecord]) -> list[Bucket]:
    """One for each of the workload's kinds of requests; the nameless kind is `-`."""
    return _buckets((record.group, record.group or "-", record) for record in records)


def by_worker(records: Sequence[RequestRecord], phase: str) -> list[Bucket]:
    """One for each worker that served `phase` (`prefill`, `decode`); a request whose server did not tell is left out."""
    told = (record for record in records if phase in record.workers)
    return _buckets((record.workers[phase], record.workers[phase], record) for record in told)


def _range(bits: int) -> str:
    first, last = (1 << bits) >> 1, (1 << bits) - 1
    return str(first) if first == last else f"{first}-{last}"


def _buckets(keyed: Iterable[tuple[int | str, str, RequestRecord]]) -> list[Bucket]:
    parts: defaultdict[tuple[int | str, str], list[RequestRecord]] = defaultdict(list)
    for key, name, record in keyed:
        if record.measured and record.outcome is not Outcome.CANCELLED:
            parts[key, name].append(record)
    return [_bucket(name, parts[key, name]) for key, name in sorted(parts)]


def _bucket(name: str, records: Sequence[RequestRecord]) -> Bucket:
    answered = [record for record in records if record.outcome is Outcome.OK]
    ttft = distribution(record.ttft_s for record in answered)
    tpot = distribution(record.tpot_s for record in answered)
    return Bucket(
        name=name,
        requests=len(records),
        failed=len(records) - len(answered),
        ttft_p50_s=ttft.p50_s if ttft else None,
        ttft_p90_s=ttft.percentiles[90.0] if ttft else None,
        ttft_p99_s=ttft.p99_s if ttft else None,
        tpot_p50_s=tpot.p50_s if tpot else None,
        cached_share=cached_share(answered),
    )
