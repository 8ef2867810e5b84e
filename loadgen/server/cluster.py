"""A system of our own for one run: `penstock up` as a subprocess, stopped whatever happens.

It stands in a session of its own, so that Ctrl-C in the terminal reaches the generator alone, which then stops it in
order. It ends by itself if the generator is killed; and its own children end with it.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import ConfigError
from common.ports import free_port
from loadgen.lifetime import ending_with
from loadgen.server.cluster_spec import ClusterSpec

_UP = (sys.executable, "-P", "-m", "services.launcher.cli", "up")
"""-P: a folder named `common` where the operator stands must not hide ours."""
_OURS = ("prefill", "decode", "mixed", "host", "port", "gateways", "redis", "run-dir")
_IS_UP = "up; logs are in"
"""What `up` prints after its first answer, when every gateway can use every worker."""
_DRAIN_S = 5
READY_WITHIN_S = 600.0
STOPPED_WITHIN_S = 60.0
"""`up` gives its children less than that, one kind after the other."""
_LOOK_EVERY_S = 0.05
_TAIL_LINES = 15


@contextmanager
def started(
    spec: ClusterSpec,
    flags: Sequence[str],
    log_dir: Path,
    environ: Mapping[str, str],
    ready_within_s: float = READY_WITHIN_S,
) -> Iterator[str]:
    """A running system with a Redis of its own; its URL. Call in the main thread: the system ends with the caller's.

    `flags` go to `penstock up`, which checks them itself. Every log ends up in `log_dir`. PENSTOCK_ variables of
    `environ` are not passed on: they are meant for another system. Raises ConfigError with up's own words if it does
    not start.
    """
    _refuse_ours(flags)
    log_dir.mkdir(parents=True, exist_ok=True)
    log, run_dir = log_dir / "up.log", Path(tempfile.mkdtemp(prefix="bench-"))  # short: it will hold Unix sockets
    port = free_port()
    try:
        process = _start([*_flags(spec, port, run_dir), *flags], log, environ)
        try:
            _wait_until_up(process, log, f"--cluster {spec}", ready_within_s)
            yield f"http://127.0.0.1:{port}"
        finally:
            _stop(process)
    finally:
        with suppress(OSError):  # a full disk must not hide why the system ended
            shutil.copytree(run_dir / "logs", log_dir, dirs_exist_ok=True)
        shutil.rmtree(run_dir, ignore_errors=True)


def _refuse_ours(flags: Sequence[str]) -> None:
    for flag in flags:
        name = flag.partition("=")[0].removeprefix("--")
        if flag.startswith("--") and name in _OURS:
            raise ConfigError(f"--cluster-flags: --{name} is decided by --cluster; leave it out")


def _flags(spec: ClusterSpec, port: int, run_dir: Path) -> list[str]:
    values = {
        "prefill": spec.prefill,
        "decode": spec.decode,
        "mixed": spec.mixed,
        "port": port,
        "run-dir": run_dir,
        "drain-s": _DRAIN_S,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def _start(flags: Sequence[str], log: Path, environ: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    clean = {name: value for name, value in environ.items() if not name.startswith("PENSTOCK_")}
    with log.open("wb") as out:
        return subprocess.Popen(
            [*_UP, *flags],
            env=clean,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=ending_with(os.getpid(), signal.SIGTERM),
        )


def _wait_until_up(process: "subprocess.Popen[bytes]", log: Path, named: str, within_s: float) -> None:
    deadline_s = time.monotonic() + within_s
    while not any(line.startswith(_IS_UP) for line in _lines(log)):
        if (code := process.poll()) is not None:
            raise ConfigError(f"{named}: `penstock up` ended with exit code {code}:\n{_end_of(log)}")
        if time.monotonic() >= deadline_s:
            raise ConfigError(f"{named}: `penstock up` was not up after {within_s:g} s; it says:\n{_end_of(log)}")
        time.sleep(_LOOK_EVERY_S)


def _lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()


def _end_of(log: Path) -> str:
    return "\n".join(f"    {line}" for line in _lines(log)[-_TAIL_LINES:] or ["(it wrote nothing)"])


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM, and SIGKILL for all of its group that is there after the time it has, or at once on another Ctrl-C."""
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOPPED_WITHIN_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the kernel kills its children with it
            process.wait()
