"""When a request that failed is tried again. Pure; chance is an argument.

Before the first token a request starts anew elsewhere; after it, prompt and emitted tokens are replayed elsewhere and the
client sees no seam. A budget keeps a cluster that fails everything from being buried under its own retries.
Source of the budget: retries as a share of requests (Google SRE book, "Handling overload").
"""

from collections.abc import Callable
from dataclasses import dataclass

from gateway.core.open_request import OpenRequest
from gateway.core.totals import RoutingTotals

_MOST_DEATHS = 3


@dataclass(frozen=True, slots=True)
class RetryTerms:
    """How hard to try."""

    attempts: int = 4
    """Of one request without a new token; each new token starts the count again. 1 never retries, nor replays."""
    budget_share: float = 0.2
    """Retries per request that came in, over time."""
    budget_burst: float = 1_000.0
    """Retries that may come at once: a worker whose time to drain is over gives all its requests up together."""
    backoff_ms: float = 25.0
    """Mean wait before the first retry; doubles with each, and is drawn between 0.5 and 1.5 times the mean."""
    longest_ms: float = 1_000.0
    wait_ms: float = 6_000.0
    """How long a request that had begun waits for a worker when none is ready."""


class RetryBudget:
    """Owns the tokens: one retry takes one, each request brings a share of one."""

    def __init__(self, terms: RetryTerms) -> None:
        self._terms = terms
        self._tokens = terms.budget_burst

    def on_request(self) -> None:
        """A request came in."""
        self._tokens = min(self._terms.budget_burst, self._tokens + self._terms.budget_share)

    def take(self) -> bool:
        """Whether one more retry is allowed; it counts as done if so."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


class Retries:
    """Whether a request may be tried again, and when. Owns the budget; `draw`: a random number from 0 to 1, for the jitter."""

    def __init__(self, terms: RetryTerms, totals: RoutingTotals, draw: Callable[[], float]) -> None:
        self._terms, self._totals, self._draw = terms, totals, draw
        self._budget = RetryBudget(terms)

    def on_request(self) -> None:
        """A request came in."""
        self._budget.on_request()

    def pause_ms(self, one: OpenRequest, *, died: bool) -> float | None:
        """How long a request that failed pauses before its next attempt; None if it has had its tries.

        A retry counts as done. The death of a worker (`died`) costs no budget: it is no storm.
        """
        if self._terms.attempts <= 1:
            return None
        if died:
            if one.deaths > _MOST_DEATHS:
                return None
        elif one.tries >= self._terms.attempts:
            return None
        elif not self._budget.take():
            self._totals.add("retries_refused_total{reason=budget}")
            return None
        return backoff_ms(self._terms, one.tries + 1, self._draw())


def backoff_ms(terms: RetryTerms, attempt: int, draw: float) -> float:
    """Wait before attempt number `attempt` (the first retry is 2); `draw`: a random number from 0 to 1."""
    mean_ms = min(terms.longest_ms, terms.backoff_ms * 2.0 ** (attempt - 2))
    return mean_ms * (0.5 + draw)
