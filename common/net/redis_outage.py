"""Whether Redis answers one part of a process, and the log's two lines about each time that it does not."""

import time
from collections.abc import Callable

from common.log import Log
from common.net.redis_address import shown


class RedisOutage:
    """Told by the one thread that asks Redis; read by any.

    Redis is advice, so a process goes on without it, and nothing else would tell why prompts go astray or nobody can join.
    One line when the answers end, one when they are back: a thread that tries for hours fills no log.
    """

    def __init__(self, log: Log, url: str, part: str, now_s: Callable[[], float] = time.monotonic) -> None:
        """`part`: who asks, `membership` or `prompt_tree`. Of `url` only what may be shown is."""
        self._log, self._part, self._now_s = log, part, now_s
        self.address = shown(url)
        """Without user and password."""
        self._since_s: float | None = None
        self.why = ""
        """What came instead of the last answer that was missed."""

    def failed(self, why: str) -> None:
        """A call was not answered, or with an error."""
        self.why = why
        if self._since_s is None:
            self._since_s = self._now_s()
            self._log.event("redis_lost", part=self._part, redis=self.address, why=why)

    def answered(self) -> None:
        """A call was answered."""
        if self._since_s is not None:
            away_s, self._since_s = self._now_s() - self._since_s, None
            self._log.event("redis_back", part=self._part, redis=self.address, away_s=round(away_s, 1))

    @property
    def lost_s(self) -> float | None:
        """How long it has not answered; None while it does."""
        since_s = self._since_s
        return None if since_s is None else self._now_s() - since_s
