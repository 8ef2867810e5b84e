"""How much came per second: at its peak, and while requests were being sent. Pure."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from loadgen.results.records import Outcome, RequestRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Steady:
    """Throughput between the first and the last send of measured requests.

    After the last send a run only drains: fewer and fewer requests share the server. That tail is part of the whole
    run's throughput, and weighs most on systems that finish prefill early and decode elsewhere. Nothing is taken off at
    the start: without warm-up, the filling of the server is part of this window.
    """

    window_s: float
    requests_per_s: float
    """Answers that ended in the window, of requests of any kind."""
    output_tokens_per_s: float
    """Tokens that came in the window."""
    total_tokens_per_s: float
    """The same, and the prompts whose first token came in it."""
    goodput_per_s: float | None
    """Answers within the targets that ended in the window; None without targets."""


def steady(records: Sequence[RequestRecord], good: Sequence[RequestRecord] | None) -> Steady | None:
    """Throughput while measured requests were being sent; `good`: those within their targets, None without targets.

    None where the window is shorter than the median answer takes: then it shows how the server fills, nothing more.
    """
    measured = [record for record in records if record.measured]
    done = [record for record in records if record.outcome is Outcome.OK]
    if not measured or not done:
        return None
    first_s, last_s = min(record.sent_s for record in measured), max(record.sent_s for record in measured)
    window_s = last_s - first_s
    if window_s <= 0 or window_s < median(record.end_s - record.sent_s for record in done):
        return None

    def inside(at_s: float) -> bool:
        return first_s <= at_s <= last_s

    output_tokens = sum(
        tokens
        for record in done
        for at_s, tokens in zip(record.chunk_s, tokens_of_chunks(record), strict=True)
        if inside(at_s)
    )
    input_tokens = sum(record.prompt_tokens for record in done if record.chunk_s and inside(record.chunk_s[0]))
    return Steady(
        window_s=window_s,
        requests_per_s=sum(inside(record.end_s) for record in done) / window_s,
        output_tokens_per_s=output_tokens / window_s,
        total_tokens_per_s=(input_tokens + output_tokens) / window_s,
        goodput_per_s=None if good is None else sum(inside(record.end_s) for record in good) / window_s,
    )


def tokens_of_chunks(record: RequestRecord) -> Sequence[float]:
    """Tokens in each chunk: as told, else an equal share of the request's."""
    if record.chunk_tokens is not None:
        return record.chunk_tokens
    n_chunks = len(record.chunk_s)
    return [record.output_tokens / n_chunks] * n_chunks if n_chunks else []


def peak_tokens_per_s(records: Sequence[RequestRecord], first_s: float) -> float:
    """Most tokens that came in one second, seconds counted from `first_s`."""
    by_second: defaultdict[int, float] = defaultdict(float)
    for record in records:
        for at_s, n_tokens in zip(record.chunk_s, tokens_of_chunks(record), strict=True):
            by_second[int(at_s - first_s)] += n_tokens
    return max(by_second.values(), default=0.0)


def peak_concurrent(records: Sequence[RequestRecord]) -> int:
    """Most requests that were under way at one time."""
    # At equal times an end comes before a start: a closed loop of n never shows n + 1.
    changes = sorted([(record.sent_s, 1) for record in records] + [(record.end_s, -1) for record in records])
    running = peak = 0
    for _, change in changes:
        running += change
        peak = max(peak, running)
    return peak
