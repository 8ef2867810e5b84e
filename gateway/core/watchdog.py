"""Requests of a gateway that no rule will ever end: there must be none, and so each is a bug to be written down. Pure.

Every request ends by its last token, an error, its deadline or its client. One is taken for stuck if it is past its deadline
and still here, if it has neither workers nor a time for its next try, or if its client waits and nobody knows it; and only
if two looks in turn find it so.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from common.ids import RequestId
from gateway.core.open_request import OpenRequest
from gateway.core.roster import WorkerState

_MARGIN_MS = 5_000.0
"""A loop that is busy may be late by less."""


@dataclass(frozen=True, slots=True)
class StuckRequest:
    """A request to be answered with an error."""

    request: RequestId
    text: str


class RequestWatch:
    """Owns what the last look found."""

    def __init__(self) -> None:
        self._suspects: dict[RequestId, str] = {}

    def look(self, waiting: Collection[RequestId], known: Iterable[OpenRequest], now_ms: float) -> list[StuckRequest]:
        """Who is stuck now and was at the last look. `waiting`: whose clients wait; `known`: all that are not over."""
        faults = dict.fromkeys(waiting, "its client waits, and nobody works on it")
        for one in known:
            faults.pop(one.request, None)
            if one.request in waiting and (fault := _fault(one, now_ms)):
                faults[one.request] = fault
        stuck = [StuckRequest(request, text) for request, text in faults.items() if request in self._suspects]
        self._suspects = faults
        return stuck


def _fault(one: OpenRequest, now_ms: float) -> str:
    late_ms = now_ms - one.deadline_ms
    if late_ms > _MARGIN_MS:
        return f"its time was over {late_ms / 1000:.1f} s ago"
    if one.attempt is not None or one.attempts_total == 0:
        return ""  # with workers, or waiting for a place
    if one.retry_at_ms is None:
        return "it has no workers, and no time for its next try"
    late_ms = now_ms - one.retry_at_ms
    return f"its next try is {late_ms / 1000:.1f} s late" if late_ms > _MARGIN_MS else ""


def request_fields(one: OpenRequest, now_ms: float) -> dict[str, object]:
    """One request for the log."""
    attempt = one.attempt
    where = "paused" if one.attempts_total else "waits for a place"
    fields: dict[str, object] = {
        "request": one.request,
        "phase": where if attempt is None else attempt.phase,
        "age_ms": round(now_ms - one.arrived_ms),
        "left_ms": round(one.deadline_ms - now_ms),
        "tokens": len(one.emitted),
        "attempts": one.attempts_total,
    }
    if attempt is not None:
        fields |= {
            "wire": attempt.wire,
            "waits_for": list(attempt.needed),
            "sent_ms_ago": round(now_ms - attempt.sent_ms),
        }
    if one.error is not None:
        fields["last_error"] = str(one.error)
    return fields


def worker_fields(state: WorkerState) -> dict[str, object]:
    """One worker for the log."""
    return {
        "id": state.member.id,
        "state": state.condition,
        "reason": state.text or ("" if state.report is None else state.report.degraded),
        "heard_ms_ago": round(state.alive_ms),
        "charged_requests": state.charged_requests,
        "breaker": state.breaker.value,
    }
