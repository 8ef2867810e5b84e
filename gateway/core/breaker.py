"""Keeps requests away from a worker that fails them, and tries it again after a while. Pure.

CLOSED --`failures` in a row--> OPEN --`open_ms` later--> HALF_OPEN --one success--> CLOSED
                                                          HALF_OPEN --one failure--> OPEN
"""

from dataclasses import dataclass
from enum import Enum


class BreakerState(Enum):
    """What is let through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class BreakerTerms:
    """When to open, and for how long."""

    failures: int = 5
    """In a row; 0 never opens."""
    open_ms: float = 10_000.0
    trial_ms: float = 2_000.0
    """Half open, one request is let through in so long."""


class Breaker:
    """Of one worker's life: a restarted worker starts with a clean record."""

    def __init__(self, terms: BreakerTerms) -> None:
        self._terms = terms
        self._failures = 0
        self._opened_ms: float | None = None
        self._tried_ms: float | None = None
        self.opened_total = 0
        """How often it has opened."""

    def state(self, now_ms: float) -> BreakerState:
        """Now."""
        if self._opened_ms is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now_ms - self._opened_ms < self._terms.open_ms else BreakerState.HALF_OPEN

    def lets_through(self, now_ms: float) -> bool:
        """Whether a request may go to the worker now."""
        match self.state(now_ms):
            case BreakerState.CLOSED:
                return True
            case BreakerState.OPEN:
                return False
            case BreakerState.HALF_OPEN:
                return self._tried_ms is None or now_ms - self._tried_ms >= self._terms.trial_ms

    def on_sent(self, now_ms: float) -> None:
        """A request goes there."""
        if self.state(now_ms) is BreakerState.HALF_OPEN:
            self._tried_ms = now_ms

    def on_success(self) -> None:
        """The worker did what it was asked to."""
        self._failures, self._opened_ms, self._tried_ms = 0, None, None

    def on_failure(self, now_ms: float) -> None:
        """The worker failed a request by its own fault."""
        self._failures += 1
        failed_trial = self.state(now_ms) is BreakerState.HALF_OPEN
        enough = self._opened_ms is None and self._terms.failures and self._failures >= self._terms.failures
        if failed_trial or enough:
            self.opened_total += 1
            self._opened_ms, self._tried_ms = now_ms, None
