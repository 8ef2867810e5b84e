"""What one HTTP request for an answer was, and what became of it: for the log, and for spans.

Small, whatever a client sends: many wait for a log that nobody reads, so no text of unbounded length stays in one, and no
exception, which would keep its frames and a body with them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from common.errors import ServingError
from common.messages.requests import Timings
from gateway.core.failure import WorkerFailed
from gateway.core.open_request import FailedAttempt
from gateway.errors import cut
from gateway.ignored_fields import NOTHING_IGNORED, IgnoredFields
from gateway.timeline import Timeline

ROUTES = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}
"""Paths that ask for answers, and OpenTelemetry's names of what they do."""
_MOST_TRACESTATE = 512  # characters that everybody must pass on, says W3C Trace Context
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def trace_context(headers: Mapping[str, str]) -> tuple[str | None, str | None]:
    """The client's `traceparent` and `tracestate` (W3C Trace Context), None for what is none or too long."""
    parent, state = headers.get("traceparent", ""), headers.get("tracestate", "")
    if _TRACEPARENT.fullmatch(parent) is None:
        return None, None
    return parent, state if 0 < len(state) <= _MOST_TRACESTATE else None


@dataclass(frozen=True, slots=True)
class Failure:
    """What is told of an error."""

    code: str
    phase: str | None
    retryable: bool
    text: str


@dataclass(slots=True)
class Account:
    """Mutable record: begun and ended by the border, filled by whoever knows. Nobody changes it after its end."""

    request: str
    path: str
    arrived_ms: float
    """On the gateway's monotonic clock."""
    arrived_unix_ns: int
    traceparent: str | None = None
    """The client's, as it came."""
    tracestate: str | None = None
    key: str = ""
    """Name of the API key that it came with."""
    model: str = ""
    ignored: IgnoredFields = NOTHING_IGNORED
    """Of its body."""
    stream: bool = False
    choices: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    timeline: Timeline = field(init=False)
    """Of the first choice."""
    finish: str | None = None
    """Of the first choice that ended; None with `error` or where the client left."""
    error: Failure | None = None
    failed_timings: Timings | None = None
    """Of the worker that failed the first choice."""
    workers: dict[str, str] = field(default_factory=dict)
    """Of the first choice: who computed the prompt, who drew the answer."""
    failed_attempts: tuple[FailedAttempt, ...] = ()
    """Of the first choice, before the one that it ended with."""
    status: int = 0
    ended_ms: float = 0.0

    def __post_init__(self) -> None:
        """Begin to take the time."""
        self.timeline = Timeline(self.arrived_ms)

    def note_ignored(self, fields: IgnoredFields) -> None:
        """Its body has unknown fields."""
        self.ignored = fields

    def failed(self, error: ServingError, choice: int | None = None) -> None:
        """It ends with `error`, by what became of one choice, if that is known."""
        self.error = Failure(error.code, error.phase, error.retryable, cut(str(error)))
        if choice == 0 and isinstance(error, WorkerFailed):
            self.failed_timings = error.timings

    def failed_fields(self) -> list[dict[str, object]]:
        """Why the first choice was tried again, for people."""
        return [
            {"code": one.code, "phase": one.phase, "worker": one.worker, "ms": round(one.ms, 3)}
            for one in self.failed_attempts
        ]

    def fields(self) -> dict[str, object]:
        """For the log."""
        timeline, error = self.timeline, self.error
        ttft_ms = timeline.ttft_ms
        found: dict[str, object] = {
            "request": self.request,
            "path": self.path,
            "model": self.model,
            "status": self.status,
            "finish": self.finish,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "generated_tokens": self.generated_tokens,
            "choices": self.choices,
            "stream": self.stream,
            "attempts": timeline.attempts,
            "workers": self.workers,
            "phases_ms": rounded(timeline.parts_ms()),
            "ttft_ms": None if ttft_ms is None else round(ttft_ms, 3),
            "e2e_ms": round(self.ended_ms - self.arrived_ms, 3),
        }
        if second_ms := timeline.second_token_ms():
            found["second_token_ms"] = rounded(second_ms)
        if excess_ms := timeline.excess_ms:
            found["excess_ms"] = round(excess_ms, 3)
        if self.failed_attempts:
            found["failed"] = self.failed_fields()
        if self.key:
            found["key"] = self.key
        if error is not None:
            found |= {"error": error.code, "phase": error.phase, "retryable": error.retryable, "text": error.text}
        if self.traceparent is not None:
            found["traceparent"] = self.traceparent
        return found


def rounded(parts_ms: dict[str, float]) -> dict[str, float]:
    """To microseconds."""
    return {part: round(value, 3) for part, value in parts_ms.items()}
