"""Real Penstock processes without waiting for their imports: forked from one process that has imported all of them.

A worker needs seconds of a core to import torch and transformers, which is most of a start. Here that is paid once per
test run; each process is then a fork of its own session, with its own environment, log file and network namespace, that
runs the `penstock` program as if it had just been started. What a start by `exec` is like is tested in tests/launcher.
"""

import atexit
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_IMPORTED = (
    *("gateway.process", "kvstore.server.__main__", "services.launcher.cli", "services.worker.build"),
    *("kvstore.server.model_layout", "transformers.models.llama.modeling_llama"),
    *("transformers.models.qwen2.modeling_qwen2", "transformers.models.qwen3.modeling_qwen3"),
)
_CLONE_NEWNET = 0x40000000
_START_S = 120.0


class Forked:
    """One process, with the part of Popen's interface that tests need."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = threading.Event()

    def ended(self, returncode: int) -> None:
        """Its parent has reaped it."""
        self.returncode = returncode
        self._ended.set()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended. Raises subprocess.TimeoutExpired."""
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def terminate(self) -> None:
        """SIGTERM, unless it has ended."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)


class Zygote:
    """The process that forks the others, and the thread that hears of their ends."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """`environ`: what libraries read when they are loaded, such as OMP_NUM_THREADS, is the same for all forks."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "tests.support.zygote", str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env={**os.environ, **environ}, cwd=_ROOT, start_new_session=True
            )
        self._socket, self._lines = ours, ours.makefile("r")
        self._asking = threading.Lock()
        self._changed = threading.Condition()  # guards what follows
        self._forked: dict[int, Forked] = {}
        self._early: dict[int, int] = {}  # ended before its fork was noted
        self._answer: int | None = None
        threading.Thread(target=self._hear, name="zygote", daemon=True).start()

    def start(
        self, arguments: Sequence[str], environ: Mapping[str, str], log: Path, network: str | None = None
    ) -> Forked:
        """`penstock ARGUMENTS`, its output appended to `log`. `network`: the file of a network namespace."""
        order = {"argv": list(arguments), "environ": dict(environ), "log": str(log), "network": network}
        with self._asking, self._changed:
            self._answer = None
            self._socket.sendall(json.dumps(order).encode() + b"\n")
            answered = self._changed.wait_for(lambda: self._answer is not None, _START_S)
            assert answered and self._answer is not None and self._answer > 0, "no process was forked"
            forked = self._forked[self._answer] = Forked(self._answer)
            if forked.pid in self._early:
                forked.ended(self._early.pop(forked.pid))
            return forked

    def close(self) -> None:
        """End it, and all that it forked."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._process.wait(timeout=20)

    def _hear(self) -> None:
        for line in self._lines:
            pid, returncode = json.loads(line)
            with self._changed:
                if returncode is None:
                    self._answer = pid
                    self._changed.notify_all()
                elif pid in self._forked:
                    self._forked.pop(pid).ended(returncode)
                else:
                    self._early[pid] = returncode
        with self._changed:
            self._answer = self._answer or -1
            self._changed.notify_all()


_RUNNING: list[Zygote] = []
_STARTING = threading.Lock()


def zygote(environ: Mapping[str, str]) -> Zygote:
    """The one of this test run; the first call starts it."""
    with _STARTING:
        if not _RUNNING:
            _RUNNING.append(Zygote(environ))
            atexit.register(_RUNNING[0].close)
        return _RUNNING[0]


def main(fd: int) -> None:
    """The forking process: an order per line in, `[pid, null]` per fork and `[pid, exit code]` per end out."""
    for module in _IMPORTED:
        __import__(module)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
    control = socket.socket(fileno=fd)
    ended_in, ended_out = os.pipe()
    os.set_blocking(ended_out, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(ended_out)
    children: set[int] = set()
    try:
        _obey(control, ended_in, children)
    finally:
        for pid in children:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def _obey(control: socket.socket, ended_in: int, children: set[int]) -> None:
    import select

    pending = b""
    while True:
        readable, _, _ = select.select([control.fileno(), ended_in], [], [])
        if ended_in in readable:
            os.read(ended_in, 4096)
            for pid, returncode in _reaped(children):
                control.sendall(json.dumps([pid, returncode]).encode() + b"\n")
        if control.fileno() in readable:
            piece = control.recv(65536)
            if not piece:
                return
            *lines, pending = (pending + piece).split(b"\n")
            for line in lines:
                pid = os.fork()
                if pid == 0:
                    _become(json.loads(line))
                children.add(pid)
                control.sendall(json.dumps([pid, None]).encode() + b"\n")


def _reaped(children: set[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for pid in list(children):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            children.discard(pid)
            found.append((pid, os.waitstatus_to_exitcode(status)))
    return found


def _become(order: dict[str, object]) -> None:
    """Never returns."""
    code = 70
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(str(order["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.closerange(3, 256)
        if order["network"] is not None:
            _enter(str(order["network"]))
        os.environ.clear()
        os.environ.update({str(name): str(text) for name, text in dict(order["environ"]).items()})  # type: ignore[call-overload]
        argv = [str(word) for word in list(order["argv"])]  # type: ignore[call-overload]
        sys.argv = ["penstock", *argv]
        from services.launcher.cli import main as penstock

        code = penstock(argv)
    except BaseException as error:  # noqa: BLE001 - a fork must not run on in its parent's code
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does before it ends
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _enter(network: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with open(network, "rb") as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {network}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
