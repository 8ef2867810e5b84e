"""A trace made to fit another machine: a part of its time, faster or slower, with shorter prompts and answers. Pure.

Lengths of blocks shrink with those of prompts, so that what was shared stays shared.
"""

from dataclasses import dataclass, replace

from common.errors import ConfigError
from loadgen.traces.trace import Session, Trace, TraceRequest
from loadgen.workload.content import CountTokens, trim
from loadgen.workload.lengths import scaled_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What is asked of a trace."""

    speed: float = 1.0
    """2: everything comes twice as fast, pauses included."""
    scale_isl: float = 1.0
    scale_osl: float = 1.0
    start_s: float = 0.0
    """In the trace's own time, as the end is: sessions that begin in [start, end) stay."""
    end_s: float | None = None


def changed(trace: Trace, change: Change) -> Trace:
    """The trace after `change`. Raises ConfigError where it has no times to choose by, or nothing is left."""
    sessions = _within(trace, change)
    block_tokens = scaled_tokens(trace.block_tokens, change.scale_isl)
    resized = [
        replace(
            session,
            requests=tuple(_request(request, trace, change, block_tokens) for request in session.requests),
            opening=_content(session.opening, change.scale_isl, trace.measure.count_tokens),
        )
        for session in sessions
    ]
    return replace(trace, sessions=tuple(resized), block_tokens=block_tokens)


def _within(trace: Trace, change: Change) -> tuple[Session, ...]:
    if change.start_s == 0 and change.end_s is None:
        return trace.sessions
    if not trace.has_times:
        raise ConfigError("--trace-start and --trace-end need a trace with times; this one has none")
    end_s = float("inf") if change.end_s is None else change.end_s
    kept = tuple(session for session in trace.sessions if change.start_s <= (session.requests[0].at_s or 0.0) < end_s)
    if not kept:
        last_s = trace.sessions[-1].requests[0].at_s or 0.0
        raise ConfigError(
            f"nothing begins from {change.start_s:g} s to {end_s:g} s; the trace begins its last at {last_s:g} s"
        )
    return kept


def _request(request: TraceRequest, trace: Trace, change: Change, block_tokens: int) -> TraceRequest:
    content, added_tokens = request.content, _added_tokens(request, trace, change, block_tokens)
    if content is not None and change.scale_isl != 1:
        content = _content(content, change.scale_isl, trace.measure.count_tokens)
        added_tokens = trace.measure.count_tokens(content)
    osl = scaled_tokens(request.output_tokens, change.scale_osl)
    cancel = request.cancel_after_tokens
    return replace(
        request,
        added_tokens=added_tokens,
        output_tokens=osl,
        content=content,
        at_s=None if request.at_s is None else (request.at_s - change.start_s) / change.speed,
        think_s=request.think_s / change.speed,
        cancel_after_tokens=None if cancel is None else int(cancel * change.scale_osl),
    )


def _added_tokens(request: TraceRequest, trace: Trace, change: Change, block_tokens: int) -> int:
    """Whole blocks become whole blocks, and the rest its share, so that ids and lengths still agree."""
    if not request.hash_ids:
        return scaled_tokens(request.added_tokens, change.scale_isl)
    whole, rest = divmod(request.added_tokens, trace.block_tokens)
    rest_tokens = min(block_tokens, scaled_tokens(rest, change.scale_isl)) if rest else 0
    return whole * block_tokens + rest_tokens


def _content(content: tuple[int, ...] | str, factor: float, count_tokens: CountTokens) -> tuple[int, ...] | str:
    if factor == 1 or not content:
        return content
    if factor > 1:
        raise ConfigError(f"--scale-isl={factor:g}: recorded prompts can be cut, not made longer; at most 1")
    return trim(content, scaled_tokens(count_tokens(content), factor), count_tokens)
