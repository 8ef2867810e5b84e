"""Real Penstock processes for tests: started on free ports, found through Redis, gone at the end."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import redis

from common.messages.liveness import Member
from common.net.redis import Registry
from tests.support.redis import redis_server
from tests.support.zygote import Forked, zygote

_QUIET = {
    "OMP_WAIT_POLICY": "passive",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def lives(process: psutil.Process) -> bool:
    """Whether it runs still; one that only waits to be reaped does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # reaped between the two questions
        return False


class Cluster:
    """A Redis and any number of processes that found each other through it."""

    def __init__(self, redis_url: str, folder: Path) -> None:
        self.redis_url, self.folder = redis_url, folder
        self.registry = Registry(redis_url, "test")
        self.processes: dict[str, Forked | subprocess.Popen[bytes]] = {}
        self.networks: dict[str, str] = {}
        """By process: the file of the network namespace that it starts in; who is not here starts in ours."""

    def start(self, role: str, name: str, **flags: object) -> None:
        """Start a process; `await_members` waits for it."""
        arguments = [role, "--id", name]
        settings = {"redis": self.redis_url, "cluster": "test", **flags}
        if role in ("prefill", "decode", "mixed"):
            settings = {"threads": 1, **settings}
        if role != "gateway":
            settings = {"run_dir": self.folder, **settings}  # or kill -9 leaves a folder behind
        for flag, value in settings.items():
            arguments += [f"--{flag.replace('_', '-')}", str(value)]
        log, environ = self.folder / f"{name}.log", {**os.environ, **_QUIET}
        self.processes[name] = zygote(_QUIET).start(arguments, environ, log, self.networks.get(name))

    def run(self, name: str, command: Sequence[str]) -> None:
        """Start any program as the process of that name; its words go to `log`."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def members(self) -> Mapping[str, Member]:
        return {member.id: member for member in self.registry.members()}

    def await_members(self, *names: str, besides: Mapping[str, Member] | None = None, timeout_s: float = 90) -> None:
        """Wait until all are in the membership, with another incarnation than in `besides`."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            members = self.members()
            old = besides or {}
            missing = [
                name
                for name in names
                if name not in members or (name in old and old[name].incarnation == members[name].incarnation)
            ]
            if not missing:
                return
            for name in missing:
                process = self.processes[name]
                if process.poll() is not None:
                    raise AssertionError(f"{name} ended with {process.returncode}:\n{self.log(name)[-3000:]}")
            if time.monotonic() > deadline_s:
                raise AssertionError(f"{missing} not there after {timeout_s} s:\n{self.log(missing[0])[-3000:]}")
            time.sleep(0.05)

    def shut_down_redis(self) -> None:
        """The server ends; nobody is told."""
        self.registry.close()
        with suppress(redis.ConnectionError):  # it closes the connection instead of answering
            redis.Redis.from_url(self.redis_url).shutdown(nosave=True)

    def kill(self, name: str) -> None:
        """kill -9, and wait for the body."""
        process = self.processes[name]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def pause(self, name: str) -> None:
        """SIGSTOP: it answers nothing until `resume`."""
        os.killpg(self.processes[name].pid, signal.SIGSTOP)

    def resume(self, name: str) -> None:
        os.killpg(self.processes[name].pid, signal.SIGCONT)

    def stopped(self, name: str) -> bool:
        """Whether the process stands still: by `pause`, or by a SIGSTOP of its own."""
        return Path(f"/proc/{self.processes[name].pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def stop(self, name: str, timeout_s: float = 20) -> int:
        """SIGTERM; the exit code."""
        process = self.processes[name]
        process.terminate()
        return process.wait(timeout=timeout_s)

    def close(self) -> None:
        for name, process in self.processes.items():
            if process.poll() is None:
                process.terminate()
                self.resume(name)  # one that stands still would not hear it
        for name, process in self.processes.items():
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.kill(name)
        self.registry.close()


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A Redis and no process yet."""
    with redis_server() as url, cluster_at(url, folder) as made:
        yield made


@contextmanager
def cluster_at(redis_url: str, folder: Path) -> Iterator[Cluster]:
    """No process yet, beside a Redis of the caller's."""
    made = Cluster(redis_url, folder)
    try:
        yield made
    finally:
        made.close()
