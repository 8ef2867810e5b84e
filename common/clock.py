"""Time as an argument: shells own a Clock and pass `now_ms` down; nothing below reads it."""

import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock of one process. Readings of two processes are never compared."""

    def now_ms(self) -> float:
        """Milliseconds since an arbitrary start."""
        ...


class MonotonicClock:
    """The operating system's monotonic clock."""

    def now_ms(self) -> float:
        """Milliseconds since an arbitrary start."""
        return time.monotonic_ns() / 1e6
