"""One log line per request, and whatever else is told of requests that are over: in a thread of its own.

Neither a pipe that nobody reads nor a slow collector can hold the gateway's loop up: the thread waits, and what does not
fit into its queue is dropped and counted. Accounts are small, so that their number bounds its bytes.
"""

import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence

from common.log import Log
from gateway.account import Account

_MOST_WAITING = 10_000
_TURN_S = 0.2
_LAST_WORDS_S = 2.0


class RequestLog:
    """Told of every request's end on the event loop; passes them on in batches. Owns its thread and its queue."""

    def __init__(self, sinks: Sequence[Callable[[Account], None]], log: Log) -> None:
        """`sinks`: called with every account, in the thread; without any there is none. `log`: hears of a sink's first bug."""
        self._sinks, self._log = sinks, log
        self._broken: set[int] = set()
        self._waiting: deque[Account] = deque()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._refused_total = self._failed_total = 0  # counted by the loop; by the thread

    def start(self) -> None:
        """Begin to pass on."""
        if self._sinks:
            self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
            self._thread.start()

    def ended(self, account: Account) -> None:
        """A request is over. Never waits."""
        if not self._sinks:
            return
        if len(self._waiting) >= _MOST_WAITING:
            self._refused_total += 1
            return
        self._waiting.append(account)

    @property
    def dropped_total(self) -> int:
        """What did not fit, or failed."""
        return self._refused_total + self._failed_total

    def stop(self) -> None:
        """Pass on what is left, for a moment."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(_LAST_WORDS_S)

    def _run(self) -> None:
        while not self._stopping.wait(_TURN_S):
            self._pass_on()
        self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            account = self._waiting.popleft()
            for number, sink in enumerate(self._sinks):
                try:
                    sink(account)
                except Exception:  # noqa: BLE001  one request's bug must not end what is told of the others
                    self._failed_total += 1
                    if number not in self._broken:
                        self._broken.add(number)
                        self._log.event("bug", request=account.request, traceback=traceback.format_exc())


def log_line(log: Log) -> Callable[[Account], None]:
    """A sink that writes event `request`, dated by the request's end."""

    def write(account: Account) -> None:
        ended_unix_s = account.arrived_unix_ns / 1e9 + (account.ended_ms - account.arrived_ms) / 1e3
        log.frequent("request", ended_unix_s, account.fields())

    return write
