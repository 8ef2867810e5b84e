"""Time as an argument: shells own a Clock and pass `now_ms` down; nothing below reads it."""

import threading
import time
from collections.abc import Callable
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


class FaultyClock:
    """A clock that is wrong as its maker says; it never goes back. Any thread may read it."""

    def __init__(
        self,
        inner: Clock,
        *,
        jump_ms: Callable[[], float] = lambda: 0.0,
        rate: float = 1.0,
        skew_ms: float = 0.0,
    ) -> None:
        """`jump_ms`: asked at every reading how far the clock jumps ahead, 0 or more. `rate`: its milliseconds for one of
        `inner`; below 1 it is slow. `skew_ms`: how far it is ahead from the beginning.
        """
        self._inner, self._jump_ms, self._rate = inner, jump_ms, rate
        self._began_ms = inner.now_ms()
        self._ahead_ms = self._began_ms + skew_ms
        self._lock = threading.Lock()  # a jump is seen by all readings after it

    def now_ms(self) -> float:
        """Milliseconds since an arbitrary start."""
        jump_ms = self._jump_ms()
        with self._lock:
            self._ahead_ms += jump_ms
            return self._ahead_ms + (self._inner.now_ms() - self._began_ms) * self._rate
