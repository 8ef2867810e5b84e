"""SIGUSR1: somebody wants to read in the log what a process is doing."""

import faulthandler
import signal
from types import FrameType

_STANDARD_ERROR = 2  # the descriptor: whoever captures `sys.stderr` may have none


class DumpSignal:
    """Made on the main thread. From then on the signal no longer ends the process.

    The stacks of all threads go to standard error at once, even if the process hangs; the process itself looks with `take`
    and writes its state.
    """

    def __init__(self) -> None:
        self._asked = False
        signal.signal(signal.SIGUSR1, self._on_signal)
        write_stacks_too()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def take(self) -> bool:
        """Whether it came since the last call."""
        asked, self._asked = self._asked, False
        return asked


def write_stacks_too() -> None:
    """Before whatever is done about the signal by now, by C code that needs nobody's turn."""
    faulthandler.register(signal.SIGUSR1, file=_STANDARD_ERROR, all_threads=True, chain=True)
