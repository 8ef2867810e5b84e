"""SIGUSR1: somebody wants to read in the log what a process is doing. SIGUSR2: the same of one whose interpreter hangs.

SIGUSR1 is heard by the interpreter, on its main thread, between two of its steps or while it waits for a lock or a socket; it
writes one `stacks` event, JSON as all events are, at once, whatever the process's loop is at: so it is with workers, stores,
gateways and `penstock up`. The loop writes the `state` event when it comes round next (`up` at once, as soon as it has
children), and one that is held by Python code that does not end never does. Who is held by C code that does not return hears
nothing. SIGUSR2 is heard by C code that needs nobody's turn, and writes plain text.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType

_STANDARD_ERROR = 2  # the descriptor: whoever captures `sys.stderr` may have none
_MOST_CALLS = 200  # of one thread: more are a recursion without end


class DumpSignal:
    """Made on the main thread. From then on the signals no longer end the process.

    The stacks of all threads go to standard error at once. Then the process's loop writes its state: one that comes round by
    itself looks with `take`, one that sleeps until it is called is called by what it gave to `call`.
    """

    def __init__(self) -> None:
        self._asked = False
        self._call: Callable[[], object] = lambda: None
        signal.signal(signal.SIGUSR1, self._on_signal)
        _hear_of_hangs()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        _write_stacks()
        self._call()

    def call(self, wake: Callable[[], object]) -> None:
        """From now on `wake` is called after each signal, on the main thread, between any two steps of it: it must only pass
        the word on, or write with `write_at_once` what it can see without a lock, and not raise."""
        self._call = wake

    def take(self) -> bool:
        """Whether it came since the last call."""
        asked, self._asked = self._asked, False
        return asked


def _write_stacks() -> None:
    """One event: of every thread its name and its calls, the innermost first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    threads = [
        {"thread": names.get(ident, str(ident)), "calls": _calls(frame)}
        for ident, frame in sys._current_frames().items()
    ]
    write_at_once({"at": round(time.time(), 3), "event": "stacks", "pid": os.getpid(), "threads": threads})


def write_at_once(record: Mapping[str, object]) -> None:
    """One event to standard error, from within a signal's call.

    Not by way of `sys.stderr`, which the thread that was interrupted may be writing to.
    """
    rest = json.dumps(record).encode() + b"\n"
    try:
        while rest:
            rest = rest[os.write(_STANDARD_ERROR, rest) :]
    except OSError:
        return  # a full disk or a closed pipe must not end who only wants to tell


def _hear_of_hangs() -> None:
    """From now on SIGUSR2 has C code write the stacks, and ends nobody."""
    faulthandler.register(signal.SIGUSR2, file=_STANDARD_ERROR, all_threads=True, chain=False)


def _calls(frame: FrameType | None) -> list[str]:
    calls: list[str] = []
    while frame is not None and len(calls) < _MOST_CALLS:
        calls.append(f"{frame.f_code.co_name} {frame.f_code.co_filename}:{frame.f_lineno}")
        frame = frame.f_back
    return calls
