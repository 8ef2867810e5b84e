"""Processes that end with the one that started them, even if that one is killed. Linux only."""

import ctypes
import os
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def ending_with(parent_pid: int, with_signal: signal.Signals) -> Callable[[], None]:
    """To run in a child: from then on it gets the signal when the thread that started it dies.

    May run between fork and exec, so everything is looked up before.
    """
    prctl, number = ctypes.CDLL(None, use_errno=True).prctl, int(with_signal)

    def in_the_child() -> None:
        prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent_pid:  # it died before the line above
            os._exit(1)

    return in_the_child
