"""One direction between two processes: what was put in comes out in order, or as its faults say, in virtual time."""

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from common.faults.plan import Outcome
from common.faults.points import Kind

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Held(Generic[T]):
    item: T
    due_ms: float


class FaultyLine(Generic[T]):
    """Holds what is late. As on a real connection, what comes after something late is late too: only `reorder` overtakes."""

    def __init__(self) -> None:
        self._held: deque[_Held[T]] = deque()  # due times never fall
        self._swapped: _Held[T] | None = None  # waits for the next one, or until it is due

    @property
    def due_ms(self) -> float | None:
        """When something can be taken; None: it is empty."""
        times = [held.due_ms for held in (*list(self._held)[:1], self._swapped) if held is not None]
        return min(times, default=None)

    def put(self, item: T, outcome: Outcome, now_ms: float) -> None:
        """Something enters at `now_ms`."""
        if outcome.has(Kind.DROP, Kind.CUT, Kind.FAIL):
            return
        due_ms = now_ms + outcome.ms_of(Kind.DELAY)
        if self._held:
            due_ms = max(due_ms, self._held[-1].due_ms)
        copies = 2 if outcome.has(Kind.DUPLICATE) else 1
        if self._swapped is None and outcome.has(Kind.REORDER):
            self._swapped = _Held(item, due_ms + outcome.swap_wait_ms)
            copies -= 1
        for _ in range(copies):
            self._held.append(_Held(item, due_ms))
        if copies and self._swapped is not None:
            self._held.append(_Held(self._swapped.item, due_ms))
            self._swapped = None

    def take(self, now_ms: float) -> list[T]:
        """What has come out by now, in order."""
        found: list[T] = []
        while self._held and self._held[0].due_ms <= now_ms:
            found.append(self._held.popleft().item)
        if self._swapped is not None and self._swapped.due_ms <= now_ms:
            found.append(self._swapped.item)
            self._swapped = None
        return found
