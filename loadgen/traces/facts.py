"""What a trace holds, in numbers: counts, rate, lengths, and what the best cache could save. Pure.

Ideal hit share: with a cache that never forgets, the blocks at the beginning of each prompt that some earlier prompt began
with, over all blocks. Requests are taken in the order of their times; those of a session without times follow one another.
A session's own answers are in the cache when its next turn comes, but for their last token, which nobody computed on.
Partial blocks are counted as blocks: so the released Mooncake traces give the figures that are published of them. The
share of tokens is what servers report of a replay: cached tokens over prompt tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loadgen.traces.blocks import Prompt, prompts
from loadgen.traces.trace import Trace


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens over all requests."""

    mean_tokens: float
    p50_tokens: float
    p90_tokens: float
    most_tokens: int


@dataclass(frozen=True, slots=True)
class TraceFacts:
    """A trace in numbers."""

    format: str
    sessions: int
    requests: int
    span_s: float | None
    """From the first to the last time, turns without one after their pauses alone; None: there are no times."""
    follows_answers: bool
    """Some turns have no time but come after answers, so that the real span is longer."""
    requests_per_s: float | None
    input: Lengths
    """Whole prompts, history and recorded lengths of answers included."""
    output: Lengths
    block_tokens: int
    ideal_hit_share: float | None
    """Of blocks. None: the trace does not say what prompts share."""
    ideal_token_share: float | None
    """Of prompt tokens; whole blocks are cached only. None: as above."""
    left_out: Mapping[str, int]
    notes: tuple[str, ...]


def facts_of(trace: Trace, block_tokens: int | None = None) -> TraceFacts:
    """The numbers of a trace; sharing by blocks of `block_tokens`, or by the trace's own. Raises ValueError if it is empty."""
    if not trace.sessions:
        raise ValueError("the trace has no requests")
    block_tokens = block_tokens or trace.block_tokens
    found = list(prompts(trace, block_tokens))
    shares = ideal_shares(found, block_tokens) if _says_what_is_shared(trace) else None
    times_s = _times_s(found)
    span_s = max(times_s) - min(times_s) if trace.has_times else None
    return TraceFacts(
        format=trace.format,
        sessions=len(trace.sessions),
        requests=len(found),
        span_s=span_s,
        follows_answers=any(prompt.request.at_s is None for prompt in found),
        requests_per_s=len(found) / span_s if span_s else None,
        input=_lengths([prompt.input_tokens for prompt in found]),
        output=_lengths([prompt.request.output_tokens for prompt in found]),
        block_tokens=block_tokens,
        ideal_hit_share=shares and shares[0],
        ideal_token_share=shares and shares[1],
        left_out=trace.left_out,
        notes=trace.notes,
    )


def ideal_shares(found: Sequence[Prompt], block_tokens: int) -> tuple[float, float]:
    """What an endless cache has: of all blocks, and of all prompt tokens."""
    cached: set[int] = set()
    before: dict[int, Prompt] = {}
    hits = total = hit_tokens = total_tokens = 0
    for prompt in _in_time(found):
        if last := before.get(prompt.session):
            computed_tokens = last.input_tokens + last.request.output_tokens - 1
            cached.update(prompt.blocks[: computed_tokens // block_tokens])
        hit = next((place for place, block in enumerate(prompt.blocks) if block not in cached), len(prompt.blocks))
        hits += hit
        total += len(prompt.blocks)
        hit_tokens += min(hit * block_tokens, prompt.input_tokens)
        total_tokens += prompt.input_tokens
        cached.update(prompt.blocks)
        before[prompt.session] = prompt
    return (hits / total, hit_tokens / total_tokens) if total else (0.0, 0.0)


def _in_time(found: Sequence[Prompt]) -> list[Prompt]:
    times_s = _times_s(found)
    return [found[place] for place in sorted(range(len(found)), key=times_s.__getitem__)]


def _times_s(found: Sequence[Prompt]) -> list[float]:
    """A request without a time has that of the request before it in its session, and its pause."""
    times_s: list[float] = []
    for place, prompt in enumerate(found):
        before_s = times_s[place - 1] + prompt.request.think_s if prompt.turn else 0.0
        times_s.append(before_s if prompt.request.at_s is None else prompt.request.at_s)
    return times_s


def _says_what_is_shared(trace: Trace) -> bool:
    return any(
        request.hash_ids or request.content is not None or len(session.requests) > 1
        for session in trace.sessions
        for request in session.requests
    )


def _lengths(tokens: Sequence[int]) -> Lengths:
    p50_tokens, p90_tokens = np.percentile(tokens, (50, 90))
    return Lengths(float(np.mean(tokens)), float(p50_tokens), float(p90_tokens), max(tokens))
