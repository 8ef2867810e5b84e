"""Events from a process's threads to its loop."""

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Event = TypeVar("Event")


class Inbox(Generic[Event]):
    """Any thread puts, the loop takes; every `put` wakes the loop."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._events: deque[Event] = deque()
        self._wake = wake

    def put(self, event: Event) -> None:
        """Hand an event to the loop. Any thread."""
        self._events.append(event)
        self._wake()

    def take(self) -> list[Event]:
        """Everything that has come, in order. The loop's thread."""
        events: list[Event] = []
        while self._events:
            events.append(self._events.popleft())
        return events
