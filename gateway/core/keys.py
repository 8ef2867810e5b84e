"""What each API key may use: requests at once, requests and tokens per minute. Pure.

Owns one account per key that has a limit. A request is charged when it is admitted and released once, however it ends;
the rates are token buckets that hold one minute's worth.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import InvalidRequest, RateLimited

_MINUTE_MS = 60_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTerms:
    """Limits of one key; None: no limit."""

    name: str
    """For logs and metrics: never the key itself."""
    max_inflight: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Prompt tokens and the most that may be generated."""
    priority: int = 0
    """Added to what its requests ask for; lower goes first."""


@dataclass(slots=True)
class _Bucket:
    per_minute: int
    level: float
    filled_ms: float

    def refill(self, now_ms: float) -> None:
        self.level = min(self.per_minute, self.level + (now_ms - self.filled_ms) * self.per_minute / _MINUTE_MS)
        self.filled_ms = now_ms

    def wait_ms(self, amount: float) -> float:
        """Until `amount` is there; a larger amount than the bucket holds waits for a full one."""
        return max(0.0, min(amount, self.per_minute) - self.level) * _MINUTE_MS / self.per_minute


@dataclass(slots=True)
class _Account:
    terms: KeyTerms
    inflight: int = 0
    requests: _Bucket | None = None
    tokens: _Bucket | None = None


class KeyLimits:
    """Admits or refuses; a refusal says when to come back."""

    def __init__(self, terms: Mapping[str, KeyTerms]) -> None:
        """`terms`: by the name under which requests come."""
        self._accounts = {name: _account(one) for name, one in terms.items()}

    def priority(self, name: str) -> int:
        """What is added to the priority of a key's requests."""
        account = self._accounts.get(name)
        return 0 if account is None else account.terms.priority

    def admit(self, name: str, n_requests: int, tokens: int, now_ms: float) -> None:
        """Charge the prompts of one HTTP request together. Keys without limits always pass.

        Raises RateLimited, or InvalidRequest for more at once than the key may ever have; then nothing is charged.
        """
        account = self._accounts.get(name)
        if account is None:
            return
        limit = account.terms.max_inflight
        if limit is not None and n_requests > limit:
            raise InvalidRequest(
                f"{n_requests} prompts at once are more than key {name!r} may have: {limit}", param="n"
            )
        if limit is not None and account.inflight + n_requests > limit:
            self._refuse(f"key {name!r} has {account.inflight} requests in flight, its limit is {limit}", 1_000.0)
        for bucket, amount, what in ((account.requests, n_requests, "requests"), (account.tokens, tokens, "tokens")):
            if bucket is None:
                continue
            bucket.refill(now_ms)
            wait_ms = bucket.wait_ms(amount)
            if wait_ms > 0:
                self._refuse(f"key {name!r} may use {bucket.per_minute} {what} per minute and has used them", wait_ms)
        self._charge(account, n_requests, tokens)

    def refund(self, name: str, n_requests: int, tokens: int) -> None:
        """What was admitted could not be taken: it was not used."""
        account = self._accounts.get(name)
        if account is not None:
            self._charge(account, -n_requests, -tokens)

    @staticmethod
    def _charge(account: _Account, n_requests: int, tokens: int) -> None:
        account.inflight += n_requests
        for bucket, amount in ((account.requests, n_requests), (account.tokens, tokens)):
            if bucket is not None:
                bucket.level -= amount  # may go below zero: a request larger than the bucket pays afterwards

    def release(self, name: str) -> None:
        """A request that was admitted has ended."""
        account = self._accounts.get(name)
        if account is not None:
            account.inflight -= 1

    @staticmethod
    def _refuse(text: str, wait_ms: float) -> None:
        raise RateLimited(f"{text}; try again in {wait_ms / 1000:.0f} s", retry_after_s=wait_ms / 1000)

    def check(self, inflight: Mapping[str, int]) -> None:
        """Each key is charged with just so many requests. Raises AssertionError."""
        for name, account in self._accounts.items():
            assert account.inflight == inflight.get(name, 0), (name, account.inflight, inflight)


def _account(terms: KeyTerms) -> _Account:
    requests, tokens = terms.requests_per_minute, terms.tokens_per_minute
    return _Account(
        terms,
        requests=None if requests is None else _Bucket(requests, requests, 0.0),
        tokens=None if tokens is None else _Bucket(tokens, tokens, 0.0),
    )
