"""One child process of the launcher: a group of its own, a log file, and no life beyond its parent's."""

import ctypes
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from services.launcher.plan import ProcessPlan

_PR_SET_PDEATHSIG = 1
_TAIL_BYTES = 16_384
_EXIT_CODES_KEPT = 8


class Child:
    """Starts, watches and ends one process. Owns the process and its open log file."""

    def __init__(self, plan: ProcessPlan, environ: Mapping[str, str], log_dir: Path) -> None:
        """`environ` is what every child gets; `plan.environ` comes on top."""
        self.plan = plan
        self.log_path = log_dir / f"{plan.name}.log"
        self._environ = {**environ, **plan.environ}
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self.started_unix_s = 0.0
        """When its present life began; 0 before the first start."""
        self.starts_total = 0
        self.exit_codes: deque[int] = deque(maxlen=_EXIT_CODES_KEPT)
        """Of the lives before the present one, the newest last."""
        self._life_from = 0  # bytes of the log that earlier lives wrote, perhaps those of an earlier system

    def start(self) -> None:
        """Start it, or start it again. Its output goes to the end of the log. Raises OSError."""
        self._close_log()
        if self._process is not None and (code := self._process.poll()) is not None:
            self.exit_codes.append(code)
        self._log = self.log_path.open("ab")
        self._life_from = self._log.seek(0, os.SEEK_END)
        self._process = subprocess.Popen(
            self.plan.argv,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            process_group=0,  # Ctrl-C in the terminal reaches the launcher alone, which then drains in order
            preexec_fn=_die_with_parent(os.getpid()),
        )
        self.started_unix_s, self.starts_total = time.time(), self.starts_total + 1

    @property
    def pid(self) -> int:
        """Process id of its present life; 0 before the first start."""
        return self._process.pid if self._process is not None else 0

    def poll(self) -> int | None:
        """Exit code (negative: the signal) if it has ended or never started; None while it runs."""
        return self._process.poll() if self._process is not None else 0

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its whole group; nothing happens if it has ended."""
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError):  # ended, and reaped by a SIGUSR1 in between, which looks at it as well
                os.killpg(self._process.pid, number)

    def close(self) -> None:
        """Kill it if it still runs, and reap it."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        self._close_log()

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def tail(self, lines: int) -> list[str]:
        """The last lines that its present life wrote to its log."""
        if not self.log_path.exists():
            return []
        with self.log_path.open("rb") as log:
            log.seek(max(self._life_from, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return log.read().decode(errors="replace").splitlines()[-lines:]


def _die_with_parent(parent_pid: int) -> "_DieWithParent":
    return _DieWithParent(parent_pid, ctypes.CDLL(None, use_errno=True))


class _DieWithParent:
    """Runs in the child between fork and exec, so everything it needs is looked up before."""

    def __init__(self, parent_pid: int, libc: ctypes.CDLL) -> None:
        self._parent_pid, self._prctl = parent_pid, libc.prctl

    def __call__(self) -> None:
        self._prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != self._parent_pid:  # the parent died before the line above
            os._exit(1)


def end(children: Sequence[Child], wait_s: float) -> list[str]:
    """SIGTERM all, wait up to `wait_s` together, SIGKILL the rest. Returns the names that had to be killed."""
    for child in children:
        child.signal(signal.SIGTERM)
    deadline_s = time.monotonic() + wait_s
    while time.monotonic() < deadline_s and any(child.poll() is None for child in children):
        time.sleep(0.02)
    killed = [child.plan.name for child in children if child.poll() is None]
    for child in children:
        child.close()
    return killed
