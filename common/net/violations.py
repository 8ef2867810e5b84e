"""What others do wrong: counted by who did it, and told in the log without letting anybody fill it."""

import time
from collections.abc import Callable

from common.log import Log

_EVERY_S = 10.0
_MOST_NAMES = 256  # a stranger can take a new name for every message


class Violations:
    """One kind of wrong. Owned by one thread.

    A culprit's first one is logged at once, and then one line every 10 s at most, which says how many there were since.
    """

    def __init__(self, event: str, log: Log | None, now_s: Callable[[], float] = time.monotonic) -> None:
        """`event`: name of the log line; `log`: None counts only."""
        self._event, self._log, self._now_s = event, log, now_s
        self._told: dict[str, tuple[float, int]] = {}
        """By culprit: when its last line was written, and how many were not since."""
        self.total = 0

    def note(self, culprit: str, text: str) -> None:
        """`culprit` did what `text` says."""
        self.total += 1
        now_s = self._now_s()
        told_s, silent = self._told.get(culprit, (-_EVERY_S, 0))
        if now_s - told_s < _EVERY_S:
            self._told[culprit] = told_s, silent + 1
            return
        self._told.pop(culprit, None)
        if len(self._told) >= _MOST_NAMES:
            if now_s - next(iter(self._told.values()))[0] < _EVERY_S:
                return  # so many at once are one: they are counted, and their first lines tell enough
            self._told.pop(next(iter(self._told)))
        self._told[culprit] = now_s, 0
        if self._log is not None:
            self._log.event(self._event, peer=culprit, text=text, unlogged=silent)
