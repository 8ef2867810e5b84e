"""How much came per second: at its peak, and while requests were being sent. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

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


def peak_tokens_per_s(records: Sequence[RequestRecord], duration_s: float) -> float:
    """Most tokens that came within one second, whenever it begins; of a shorter run, all of them over its duration."""
    at_s = np.concatenate([np.empty(0), *(np.asarray(record.chunk_s) for record in records)])
    tokens = np.concatenate([np.empty(0), *(np.asarray(tokens_of_chunks(record)) for record in records)])
    if at_s.size == 0:
        return 0.0
    order = np.argsort(at_s, kind="stable")
    at_s, came = at_s[order], np.concatenate([[0.0], np.cumsum(tokens[order])])
    window_s = min(1.0, max(duration_s, 1e-9))
    ends = np.searchsorted(at_s, at_s + window_s, side="left")
    return float((came[ends] - came[:-1]).max() / window_s)


def peak_concurrent(records: Sequence[RequestRecord]) -> int:
    """Most requests that were under way at one time."""
    # At equal times an end comes before a start: a closed loop of n never shows n + 1.
    changes = sorted([(record.sent_s, 1) for record in records] + [(record.end_s, -1) for record in records])
    running = peak = 0
    for _, change in changes:
        running += change
        peak = max(peak, running)
    return peak
