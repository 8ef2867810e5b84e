"""Real workers as threads of the test's own process: everything but the process itself, in a tenth of the time.

A worker here is built from the same settings, joins the same Redis, listens on real sockets and shares its real page
memory; what needs a process of its own (kill -9, signals, exit codes) is for tests.support.processes.
"""

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from common.messages.liveness import Member
from common.net.redis import Registry
from common.settings import load
from services.worker.build import Worker
from services.worker.settings import WorkerSettings
from tests.support.redis import redis_server

_SWITCH_S = 0.0005  # as a worker process has it
_BUILDING = threading.Lock()
"""transformers sets torch's default dtype while it builds a model: one at a time."""


class _Running:
    """One worker and the thread that builds, serves and closes it."""

    def __init__(self, role: str, settings: WorkerSettings) -> None:
        self._role, self._settings = role, settings
        self._failure: BaseException | None = None
        self._stopping, self._built = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"worker {settings.id}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            worker = Worker(self._role, self._settings)
            with _BUILDING:
                worker.__enter__()
            self._built.set()
            try:
                worker.serve(self._stopping.is_set)
            finally:
                worker.__exit__(None, None, None)
        except BaseException as error:  # noqa: BLE001 - whoever waits for the worker raises it
            self._failure = error
        finally:
            self._built.set()

    def await_built(self, timeout_s: float = 60.0) -> None:
        """Raises what building raised."""
        assert self._built.wait(timeout_s), "a worker was not built in time"
        if self._failure is not None:
            raise self._failure

    def tell_to_stop(self) -> None:
        """As SIGTERM would: it begins to drain."""
        self._stopping.set()

    def stop(self, timeout_s: float = 30.0) -> None:
        """Wait until it has ended; raises what serving raised."""
        self.tell_to_stop()
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "a worker did not end when it was told to"
        if self._failure is not None:
            raise self._failure


class ThreadCluster:
    """A Redis and any number of workers of this process that found each other through it."""

    def __init__(self, redis_url: str, folder: Path) -> None:
        self.redis_url, self._folder = redis_url, folder
        self.registry = Registry(redis_url, "test")
        self._running: dict[str, _Running] = {}

    def start(self, role: str, name: str, **flags: object) -> Member:
        """Start a worker and wait until it has joined. Raises what building it raised."""
        given = {"threads": 1, "drain_s": 5, **flags}
        given |= {"redis": self.redis_url, "cluster": "test", "run_dir": self._folder, "id": name}
        arguments = [word for flag, value in given.items() for word in (f"--{flag.replace('_', '-')}", str(value))]
        self._running[name] = _Running(role, load(WorkerSettings, arguments, {}))
        self._running[name].await_built()
        return self.members()[name]

    def await_members(self, *names: str) -> None:
        """As a Cluster of processes has it; here they have joined when `start` returns."""
        assert set(names) <= set(self.members())

    def members(self) -> Mapping[str, Member]:
        """Who has joined, by name."""
        return {member.id: member for member in self.registry.members()}

    def stop(self, name: str) -> None:
        """As SIGTERM would."""
        self._running.pop(name).stop()

    def close(self) -> None:
        """Stop all that still run."""
        try:
            for running in self._running.values():
                running.tell_to_stop()
            for name in list(self._running):
                self.stop(name)
        finally:
            self.registry.close()


@contextmanager
def thread_cluster(folder: Path) -> Iterator[ThreadCluster]:
    """A Redis and no worker yet."""
    before_s = sys.getswitchinterval()
    with redis_server() as url:
        made = ThreadCluster(url, folder)
        sys.setswitchinterval(_SWITCH_S)
        try:
            yield made
        finally:
            sys.setswitchinterval(before_s)
            made.close()
