"""Where one prompt's time went, as parts that follow one another. Pure.

Durations are differences of two readings of one clock: the gateway's own, or those that a worker took of its clock and
sent along (common.messages.requests.Timings). What is left between sending a prompt and hearing its first token, after
the workers' parts, is `wire`.

    queue           arrival, body, parsing, tokenising, waiting room, up to the first decision
    retries         attempts that failed and the pauses after them, up to the last decision
    route           that decision and the tree's lookup, up to the moment before the prompt goes into a socket
    prefill_queue, compute, grant_wait, transfer    as in Timings
    wire            networks between processes, sockets, and the loops' delay in reading them
    reply           the first token's way from this gateway's loop to the client's socket
    lost            before a failure: time with workers that did not live, or wait, to say where it went

A worker may tell what cannot be: then the parts are more than the whole, by `excess_ms`, or a value is none. Both are
counted as violations, and never hidden.
"""

import msgspec

from common.messages.requests import Timings

WORKER_PARTS = ("prefill_queue", "compute", "grant_wait", "transfer")
FIRST_TOKEN_PARTS = ("queue", "retries", "route", *WORKER_PARTS, "wire", "reply")
SECOND_TOKEN_PARTS = ("decode_queue", "first_step")
PARTS = (*FIRST_TOKEN_PARTS, "lost", *SECOND_TOKEN_PARTS)
_MOST_MS = 1e9
_RATES_MS = 1.0
"""Clocks of two machines do not run at quite the same rate."""


class Timeline:
    """Mutable record, owned by who answers the request. All times are the gateway's monotonic clock, in milliseconds."""

    __slots__ = (
        "_first_begun_ms",
        "_told",
        "_unusable",
        "arrived_ms",
        "attempts",
        "begun_ms",
        "ended_ms",
        "first_ms",
        "second",
        "sent_ms",
        "written_ms",
    )

    def __init__(self, arrived_ms: float) -> None:
        self.arrived_ms = arrived_ms
        self.attempts = 0
        self._first_begun_ms = self.begun_ms = self.sent_ms = arrived_ms
        self._told: Timings | None = None
        self._unusable = 0
        self.first_ms: float | None = None
        """When its first token was here."""
        self.written_ms: float | None = None
        """When that was on its way to the client."""
        self.second: Timings | None = None
        self.ended_ms: float | None = None

    def sent(self, begun_ms: float, sent_ms: float) -> None:
        """It went to workers, for the first time or again; the decision began at `begun_ms`. A replay changes nothing."""
        self.attempts += 1
        if self.first_ms is not None:
            return
        if self.attempts == 1:
            self._first_begun_ms = begun_ms
        self.begun_ms, self.sent_ms = begun_ms, sent_ms

    def first(self, timings: Timings | None, now_ms: float) -> None:
        """Its first token is here."""
        self._told, self.first_ms = self._usable(timings), now_ms

    def second_token(self, timings: Timings) -> None:
        """The second token of a handed-over request is here."""
        self.second = self._usable(timings)

    def written(self, now_ms: float) -> None:
        """Its first token is on its way to the client."""
        self.written_ms = now_ms

    def ended(self, now_ms: float, timings: Timings | None = None) -> None:
        """It is over. `timings`: of the worker that failed it."""
        self.ended_ms = now_ms
        if self.first_ms is None:
            self._told = self._usable(timings)

    def _usable(self, timings: Timings | None) -> Timings | None:
        """What a worker told, with 0 for all that is no duration."""
        if timings is None:
            return None
        told = {name: getattr(timings, name) for name in timings.__struct_fields__}
        wrong = dict.fromkeys((name for name, value in told.items() if not 0 <= value <= _MOST_MS), 0.0)
        self._unusable += len(wrong)
        return msgspec.structs.replace(timings, **wrong) if wrong else timings

    @property
    def excess_ms(self) -> float:
        """By how much the workers' parts are more than there was time for."""
        return max(0.0, -self._left_ms())

    @property
    def violations(self) -> int:
        """How often workers told what cannot be."""
        return self._unusable + (self.excess_ms > _RATES_MS)

    def _left_ms(self) -> float:
        """From sending to the first token or the end, what no worker has told of."""
        until_ms = self.ended_ms if self.first_ms is None else self.first_ms
        if until_ms is None:
            return 0.0
        told = Timings() if self._told is None else self._told
        told_ms = told.prefill_queue_ms + told.compute_ms + told.grant_wait_ms + told.transfer_ms
        return until_ms - self.sent_ms - told_ms

    @property
    def ttft_ms(self) -> float | None:
        """Arrival to the first token's departure; None if there was none."""
        if self.first_ms is None:
            return None
        return (self.first_ms if self.written_ms is None else self.written_ms) - self.arrived_ms

    def parts_ms(self) -> dict[str, float]:
        """In the order of time: up to the first token, or up to the end of a request that got none."""
        until_ms = self.ended_ms if self.first_ms is None else self.first_ms
        if until_ms is None:
            return {}
        if not self.attempts:
            return {"queue": until_ms - self.arrived_ms}
        told = self._told
        parts = {
            "queue": self._first_begun_ms - self.arrived_ms,
            "retries": self.begun_ms - self._first_begun_ms,
            "route": self.sent_ms - self.begun_ms,
            **{part: 0.0 if told is None else getattr(told, f"{part}_ms") for part in WORKER_PARTS},
        }
        left_ms = max(0.0, self._left_ms())  # less than nothing is `excess_ms`
        if self.first_ms is None:
            return parts | {"wire" if told is not None else "lost": left_ms}
        return parts | {"wire": left_ms, "reply": (self.ttft_ms or 0.0) + self.arrived_ms - self.first_ms}

    def second_token_ms(self) -> dict[str, float]:
        """Parts of the time from a hand-over to the second token; empty where nobody was handed over."""
        return {} if self.second is None else {p: getattr(self.second, f"{p}_ms") for p in SECOND_TOKEN_PARTS}
