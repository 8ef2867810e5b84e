"""A trace: who asked for how much, when, and what prompts had in common; read from a file of any format. Pure.

Content may be known (text or token ids), named (equal hash ids are equal blocks), or lengths alone. What is not known is
made up when the trace is replayed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from loadgen.traces.measure import BY_CHARACTERS, TextMeasure
from loadgen.workload.plan import Content

MOONCAKE_BLOCK_TOKENS = 512
"""Tokens that one hash id stands for in Mooncake's released files."""
PAGE_TOKENS = 16
"""Blocks that servers commonly cache by: what sharing is judged by where a file names no blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request. Times count from the start of the trace."""

    added_tokens: int
    """What it adds to its session; of the first request the whole prompt, but for the session's opening."""
    output_tokens: int
    at_s: float | None = None
    """None: the trace does not say."""
    think_s: float = 0.0
    """From the end of the answer before it in the session."""
    content: Content | None = None
    """What is added; None: not recorded."""
    hash_ids: tuple[int, ...] = ()
    """Names of the blocks of what is added, the last of which may be partial; without content only."""
    cancel_after_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """Requests that are sent one after the other, each with the history of those before."""

    requests: tuple[TraceRequest, ...]
    """At least one."""
    name: str = ""
    opening: Content = ()
    """A system prompt, where the file has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A whole file, in the order of first requests."""

    format: str
    sessions: tuple[Session, ...]
    block_tokens: int = MOONCAKE_BLOCK_TOKENS
    """Tokens that one hash id stands for; without hash ids, those that sharing is judged by."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Rows that real files have and nobody can replay: reason -> how many."""
    notes: tuple[str, ...] = ()
    """What a reader of results must know about this file, one sentence each."""
    measure: TextMeasure = BY_CHARACTERS
    """What texts were counted with."""

    @property
    def n_requests(self) -> int:
        """Over all sessions."""
        return sum(len(session.requests) for session in self.sessions)

    @property
    def has_times(self) -> bool:
        """Every session's first request has its time."""
        return bool(self.sessions) and all(session.requests[0].at_s is not None for session in self.sessions)


def from_start(sessions: list[Session]) -> tuple[Session, ...]:
    """Sessions in the order of their times, with the earliest at 0; those without times stay in place, at the end."""
    times_s = [request.at_s for session in sessions for request in session.requests if request.at_s is not None]
    if not times_s:
        return tuple(sessions)
    first_s = min(times_s)
    moved = [replace(session, requests=tuple(_moved(r, -first_s) for r in session.requests)) for session in sessions]
    return tuple(sorted(moved, key=_start_s))


def _start_s(session: Session) -> float:
    at_s = session.requests[0].at_s
    return float("inf") if at_s is None else at_s


def _moved(request: TraceRequest, by_s: float) -> TraceRequest:
    return request if request.at_s is None else replace(request, at_s=request.at_s + by_s)
