"""Ctrl-C and SIGTERM as something to ask about, so that nothing is torn down at a random line."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType


class Interrupted(Exception):
    """The operator asked to stop."""


class Interrupts:
    """Counts stop signals while its `with` block runs, and puts the old signal handlers back after it."""

    def __init__(self) -> None:
        self.count = 0
        self._raise_at_once = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interrupts":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave us

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self._raise_at_once:
            raise Interrupted

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.count:
            raise Interrupted

    @contextmanager
    def breaking_in(self, seen: int = 0) -> Iterator[None]:
        """For a wait inside a library: a signal after the first `seen` ones raises Interrupted right there."""
        if self.count > seen:
            raise Interrupted
        self._raise_at_once = True
        try:
            yield
        finally:
            self._raise_at_once = False
