"""Requests that wait for a place in the gateway, because as many as it may have at work are at work. Pure.

Owns one entry per waiting request. It leaves by its turn, by being pushed out by a more urgent one, by its time, or with
its client. The most urgent goes first (lowest priority number), equals in order of arrival.
"""

import heapq
from collections.abc import Iterator

from common.ids import RequestId
from gateway.core.open_request import OpenRequest


class WaitingRoom:
    """Bounded: `add` says who must leave."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._order: list[tuple[int, int, RequestId]] = []  # also of requests that have left since
        self._waiting: dict[RequestId, tuple[OpenRequest, tuple[int, int]]] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[OpenRequest]:
        return (one for one, _ in self._waiting.values())

    def add(self, one: OpenRequest) -> OpenRequest | None:
        """Let it wait; returns who has no place then: nobody, the least urgent that waited, or `one` itself."""
        self._arrivals += 1
        rank = (one.priority, self._arrivals)
        pushed_out: OpenRequest | None = None
        if len(self._waiting) >= self._max_waiting:
            last = max(self._waiting.values(), key=lambda entry: entry[1], default=None)
            if last is None or last[1] < rank:
                return one
            pushed_out = last[0]
            self.remove(pushed_out.request)
        self._waiting[one.request] = one, rank
        heapq.heappush(self._order, (*rank, one.request))
        return pushed_out

    def next(self) -> OpenRequest | None:
        """Whose turn it is; it waits no more."""
        while self._order:
            entry = self._waiting.pop(heapq.heappop(self._order)[2], None)
            if entry is not None:
                return entry[0]
        return None

    def remove(self, request: RequestId) -> bool:
        """It waits no more; False if it did not."""
        return self._waiting.pop(request, None) is not None
