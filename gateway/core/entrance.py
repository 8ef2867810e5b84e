"""Who may come in, who waits for a place, and who is sent away. Pure.

Owns what each key has in the house, through KeyLimits, and the requests that wait, through the WaitingRoom. Every request
that was let in leaves by `leave`, `cancel`, `end_late` or by being pushed out, and is given back to its key.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from common.errors import Busy, RateLimited
from common.ids import RequestId
from gateway.core.actions import Action, End
from gateway.core.keys import KeyLimits
from gateway.core.open_request import OpenRequest
from gateway.core.order import Order
from gateway.core.terms import Terms
from gateway.core.totals import RoutingTotals
from gateway.core.waiting import WaitingRoom

_LONGEST_RETRY_AFTER_S = 60.0


class Entrance:
    """Decides; never performs."""

    def __init__(
        self, keys: KeyLimits, totals: RoutingTotals, terms: Terms, retry_after_s: Callable[[float], float | None]
    ) -> None:
        """`retry_after_s`: at a time, when another try may succeed; None while nobody knows."""
        self._keys, self._totals, self._terms, self._known_retry_after_s = keys, totals, terms, retry_after_s
        self._waiting = WaitingRoom(terms.max_waiting)

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def __iter__(self) -> Iterator[OpenRequest]:
        """Those that wait."""
        return iter(self._waiting)

    def admit(self, orders: Sequence[Order], now_ms: float) -> list[OpenRequest]:
        """Charge the prompts of one HTTP request to its key. Raises RateLimited or InvalidRequest, and then charges nothing."""
        key = orders[0].key
        try:
            self._keys.admit(key, len(orders), _tokens(orders), now_ms)
        except RateLimited as error:
            self._totals.add("shed_total{reason=key-limit}")
            raise error.in_phase("queue") from None
        head_start = self._keys.priority(key)
        return [OpenRequest(one, now_ms, now_ms + self._terms.timeout_ms, one.priority + head_start) for one in orders]

    def refund(self, orders: Sequence[Order]) -> None:
        """None of what was admitted could be taken."""
        self._keys.refund(orders[0].key, len(orders), _tokens(orders))

    def leave(self, one: OpenRequest) -> None:
        """A request that was admitted has ended, or has no place."""
        self._keys.release(one.order.key)

    def wait(self, one: OpenRequest, n_open: int, now_ms: float) -> list[Action]:
        """Let it wait for one of the places that `n_open` requests have. Raises Busy; another one may have to go instead."""
        pushed_out = self._waiting.add(one)
        if pushed_out is None:
            return []
        self._totals.add("shed_total{reason=queue-full}")
        text = (
            f"{n_open} requests are in flight here, the limit is {self._terms.max_open}, and {len(self._waiting)} wait; "
            "try again later"
        )
        error = Busy(text, retry_after_s=self._retry_after_s(now_ms)).in_phase("queue")
        if pushed_out is one:
            raise error
        self.leave(pushed_out)
        return [End(pushed_out.request, error)]

    def first(self) -> OpenRequest | None:
        """Whose turn it is; it goes on waiting until `started`."""
        return self._waiting.first()

    def started(self, one: OpenRequest) -> None:
        """It has a place."""
        self._waiting.remove(one.request)

    def cancel(self, request: RequestId) -> None:
        """Its client has left; others are ignored."""
        one = self._waiting.get(request)
        if one is not None:
            self._waiting.remove(request)
            self.leave(one)

    def end_late(self, now_ms: float) -> list[Action]:
        """Nobody waits for ever."""
        late = [one for one in self._waiting if now_ms - one.arrived_ms >= self._terms.wait_ms]
        if not late:
            return []
        text = f"no place was free within {self._terms.wait_ms / 1000:g} s; try again later"
        error = Busy(text, retry_after_s=self._retry_after_s(now_ms)).in_phase("queue")
        for one in late:
            self._waiting.remove(one.request)
            self.leave(one)
            self._totals.add("shed_total{reason=waited-too-long}")
        return [End(one.request, error) for one in late]

    def _retry_after_s(self, now_ms: float) -> float:
        return min(_LONGEST_RETRY_AFTER_S, max(1.0, self._known_retry_after_s(now_ms) or 1.0))

    def check(self, inside: Iterable[OpenRequest]) -> None:
        """Each key is charged with its requests `inside` and those that wait. Raises AssertionError."""
        self._keys.check(Counter(one.order.key for one in (*inside, *self._waiting)))
        self._waiting.check()


def _tokens(orders: Sequence[Order]) -> int:
    return sum(len(order.prompt) + order.sampling.max_tokens for order in orders)
