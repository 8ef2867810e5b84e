"""The same numbers for parts of a run: by turn, prompt length, group and worker. Pure.

An average over two kinds of requests describes neither; these tables show where kinds differ. They count what the
summary's latencies count: measured requests that were not cancelled, latency over the answered ones.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from loadgen.results.metrics import Distribution, cached_share, distribution
from loadgen.results.records import Outcome, RequestRecord

_Key = TypeVar("_Key", int, str, tuple[int, int])


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket(Generic[_Key]):
    """One part of a run."""

    key: _Key
    """What its requests have in common."""
    answered: int
    failed: int
    input_tokens: int
    """Of the answered, like all that follows."""
    output_tokens: int
    cached_share: float | None
    """Cached tokens / prompt tokens of those that told; None if none did."""
    ttft: Distribution | None
    """None without a sample, as below."""
    tpot: Distribution | None

    @property
    def mean_input_tokens(self) -> float | None:
        """None: nothing was answered."""
        return self.input_tokens / self.answered if self.answered else None

    @property
    def mean_output_tokens(self) -> float | None:
        """None: nothing was answered."""
        return self.output_tokens / self.answered if self.answered else None


def by_turn(records: Iterable[RequestRecord]) -> list[Bucket[int]]:
    """One for each place in a conversation, from 0."""
    return _buckets(records, lambda record: record.turn)


def by_input_length(records: Iterable[RequestRecord]) -> list[Bucket[tuple[int, int]]]:
    """By prompt tokens, least and most, up to powers of two (513 to 1,024), only those that occur; 0 to 0: nobody counted."""
    return _buckets(records, lambda record: _range(record.prompt_tokens))


def by_group(records: Iterable[RequestRecord]) -> list[Bucket[str]]:
    """One for each of the workload's kinds of requests; one of them may be nameless."""
    return _buckets(records, lambda record: record.group)


def by_worker(records: Iterable[RequestRecord], phase: str) -> list[Bucket[str]]:
    """One for each worker that served `phase` (`prefill`, `decode`); a request whose server did not tell is left out."""
    return _buckets((record for record in records if phase in record.workers), lambda record: record.workers[phase])


def phases_served(records: Iterable[RequestRecord]) -> list[str]:
    """Phases whose workers the server told, in the order of time."""
    return sorted(
        {phase for record in records for phase in record.workers}, key=lambda phase: (phase != "prefill", phase)
    )


def _range(tokens: int) -> tuple[int, int]:
    most = 1 << (tokens - 1).bit_length() if tokens else 0
    return min(most // 2 + 1, most), most


def _buckets(records: Iterable[RequestRecord], key_of: Callable[[RequestRecord], _Key]) -> list[Bucket[_Key]]:
    parts: defaultdict[_Key, list[RequestRecord]] = defaultdict(list)
    for record in records:
        if record.measured and record.outcome is not Outcome.CANCELLED:
            parts[key_of(record)].append(record)
    return [_bucket(key, parts[key]) for key in sorted(parts)]


def _bucket(key: _Key, records: Sequence[RequestRecord]) -> Bucket[_Key]:
    answered = [record for record in records if record.outcome is Outcome.OK]
    return Bucket(
        key=key,
        answered=len(answered),
        failed=len(records) - len(answered),
        input_tokens=sum(record.prompt_tokens for record in answered),
        output_tokens=sum(record.output_tokens for record in answered),
        cached_share=cached_share(answered),
        ttft=distribution(record.ttft_s for record in answered),
        tpot=distribution(record.tpot_s for record in answered),
    )
