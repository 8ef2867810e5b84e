"""When a process that died is started again, and when the launcher gives up. Pure: time is an argument."""

from dataclasses import dataclass

_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 5.0
_FIRST_SETTING_WAIT_S = 5.0
_LONGEST_SETTING_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class RestartAt:
    """Start it again at this time of the caller's clock."""

    at_s: float
    attempt: int
    """Deaths within the window, or ends in a row for a setting, this one included."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """It dies faster than restarting can help."""

    reason: str


class RestartPolicy:
    """Restarts of one process: at most `limit` within `window_s`, each wait twice the one before.

        wait(n) [s] = min(5, 0.2 * 2^(n - 1))      n = deaths within the window

    Who ends because a setting must be changed has not died: somebody has to put right what it names (a file, a port, a
    key), and until then the others serve on. It is tried slowly, wait(n) = min(60, 5 * 2^(n - 1)), and never given up.

    Owns the times of the deaths; one leaves when it is older than the window.
    """

    def __init__(self, limit: int = 5, window_s: float = 60.0) -> None:
        self._limit, self._window_s = limit, window_s
        self._deaths_s: list[float] = []
        self._refusals = 0

    def on_death(self, now_s: float) -> RestartAt | GiveUp:
        """The process died now."""
        self._refusals = 0
        self._deaths_s = [at_s for at_s in self._deaths_s if now_s - at_s < self._window_s] + [now_s]
        deaths = len(self._deaths_s)
        if deaths > self._limit:
            return GiveUp(f"died {deaths} times within {self._window_s:g} s")
        return RestartAt(now_s + min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (deaths - 1)), deaths)

    def on_setting(self, now_s: float) -> RestartAt:
        """The process ended now and says that a setting must be changed."""
        self._refusals += 1
        wait_s = _FIRST_SETTING_WAIT_S * 2 ** min(self._refusals - 1, 10)
        return RestartAt(now_s + min(_LONGEST_SETTING_WAIT_S, wait_s), self._refusals)
