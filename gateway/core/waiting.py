"""Requests that wait for a place in the gateway, because as many as it may have at work are at work. Pure.

Owns one entry per waiting request. It leaves by its turn, by being pushed out by a more urgent one, by its time, or with
its client. Who goes first: the earliest arrival, where each step of priority counts as so much later; so the urgent go
first, and nobody waits for ever behind them.
"""

import heapq
from collections.abc import Iterator

from common.ids import RequestId
from common.policy.urgency import rank_ms
from gateway.core.open_request import OpenRequest

_SPARE_ENTRIES = 64
_Rank = tuple[float, int]


class WaitingRoom:
    """Bounded: `add` says who must leave."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._order: list[tuple[_Rank, RequestId]] = []  # also of requests that have left since
        self._waiting: dict[RequestId, tuple[OpenRequest, _Rank]] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[OpenRequest]:
        return (one for one, _ in self._waiting.values())

    def get(self, request: RequestId) -> OpenRequest | None:
        """The request, if it waits."""
        entry = self._waiting.get(request)
        return None if entry is None else entry[0]

    def add(self, one: OpenRequest) -> OpenRequest | None:
        """Let it wait; returns who has no place then: nobody, the last in order of those that waited, or `one` itself."""
        self._arrivals += 1
        rank = (rank_ms(one.arrived_ms, one.priority), self._arrivals)
        pushed_out: OpenRequest | None = None
        if len(self._waiting) >= self._max_waiting:
            last = max(self._waiting.values(), key=lambda entry: entry[1], default=None)
            if last is None or last[1] < rank:
                return one
            pushed_out = last[0]
            self.remove(pushed_out.request)
        self._waiting[one.request] = one, rank
        if len(self._order) > 2 * len(self._waiting) + _SPARE_ENTRIES:
            self._order = [(rank, request) for request, (_, rank) in self._waiting.items()]
            heapq.heapify(self._order)
        else:
            heapq.heappush(self._order, (rank, one.request))
        return pushed_out

    def first(self) -> OpenRequest | None:
        """Whose turn it is; it goes on waiting until `remove`."""
        while self._order:
            entry = self._waiting.get(self._order[0][1])
            if entry is not None:
                return entry[0]
            heapq.heappop(self._order)
        return None

    def remove(self, request: RequestId) -> bool:
        """It waits no more; False if it did not."""
        return self._waiting.pop(request, None) is not None

    def check(self) -> None:
        """Everybody who waits has a turn, and those who have left are forgotten. Raises AssertionError."""
        assert len(self._waiting) <= self._max_waiting, (len(self._waiting), self._max_waiting)
        assert self._waiting.keys() <= {request for _, request in self._order}
        assert len(self._order) <= 2 * self._max_waiting + _SPARE_ENTRIES + 1, len(self._order)
