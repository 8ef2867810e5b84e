"""What does not change while a gateway lives."""

from dataclasses import dataclass

from gateway.core.recovery import RetryTerms


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Limits of one gateway."""

    timeout_ms: float
    """What each request has from its arrival."""
    max_open: int
    """Requests with workers at the most."""
    max_waiting: int = 0
    """Requests that may wait for one of those places; one more is refused as busy."""
    max_wait_ms: float = 30_000.0
    """After so long a waiting request is refused as busy."""
    retry: RetryTerms

    @property
    def wait_ms(self) -> float:
        """How long a request waits for a place."""
        return min(self.max_wait_ms, self.timeout_ms)
