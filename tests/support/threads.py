"""Real workers and KV stores as threads of the test's own process: all but the process itself, in a tenth of the time.

They are built from the same settings, join the same Redis, listen on real sockets and share their real memory; what needs
a process of its own (kill -9, signals, exit codes) is for tests.support.processes.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from common.messages.liveness import Member
from common.net.redis import Registry
from common.settings import load
from kvstore.server import __main__ as kvstore
from kvstore.server.settings import KvStoreSettings
from services.worker.build import Worker
from services.worker.settings import WorkerSettings
from tests.support.redis import redis_server

_SWITCH_S = 0.0005  # as a worker process has it
_BUILDING = threading.Lock()
"""transformers sets torch's default dtype while it builds a model: one at a time."""
_START_S = 60.0

Stopping = Callable[[], bool]


class _Running:
    """The thread that builds, serves and closes one of them."""

    def __init__(self, name: str, serve: Callable[[Stopping], object]) -> None:
        self._stopping = threading.Event()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(serve,), name=name, daemon=True)
        self._thread.start()

    def _run(self, serve: Callable[[Stopping], object]) -> None:
        try:
            serve(self._stopping.is_set)
        except BaseException as error:  # noqa: BLE001 - whoever waits for it raises it
            self.failure = error

    def tell_to_stop(self) -> None:
        """As SIGTERM would: it begins to drain."""
        self._stopping.set()

    def stop(self, timeout_s: float = 30.0) -> None:
        """Wait until it has ended; raises what serving raised."""
        self.tell_to_stop()
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"{self._thread.name} did not end when it was told to"
        if self.failure is not None:
            raise self.failure


class ThreadCluster:
    """A Redis and any number of workers and KV stores of this process that found each other through it."""

    def __init__(self, redis_url: str, folder: Path) -> None:
        self.redis_url, self._folder = redis_url, folder
        self.registry = Registry(redis_url, "test")
        self._running: dict[str, _Running] = {}

    def start(self, role: str, name: str, **flags: object) -> Member:
        """Start it and wait until it has joined. Raises what building it raised."""
        given: dict[str, object] = {} if role == "kvstore" else {"threads": 1, "drain_s": 0}
        given |= {**flags, "redis": self.redis_url, "cluster": "test", "run_dir": self._folder, "id": name}
        words = [word for flag, value in given.items() for word in (f"--{flag.replace('_', '-')}", str(value))]
        serve = _store(load(KvStoreSettings, words, {})) if role == "kvstore" else _worker(role, words)
        self._running[name] = _Running(name, serve)
        self.await_members(name)
        return self.members()[name]

    def await_members(self, *names: str) -> None:
        """Wait until all have joined."""
        deadline_s = time.monotonic() + _START_S
        while missing := set(names) - set(self.members()):
            for name in missing:
                if (failure := self._running[name].failure) is not None:
                    raise failure
            assert time.monotonic() < deadline_s, f"{missing} not there after {_START_S} s"
            time.sleep(0.01)

    def members(self) -> Mapping[str, Member]:
        """Who has joined, by name."""
        return {member.id: member for member in self.registry.members()}

    def tell_to_stop(self, name: str) -> None:
        """As SIGTERM would; `stop` waits for its end."""
        self._running[name].tell_to_stop()

    def stop(self, name: str) -> None:
        """As SIGTERM would, and wait."""
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


def _store(settings: KvStoreSettings) -> Callable[[Stopping], object]:
    return lambda stopping: kvstore.run(settings, stopping)


def _worker(role: str, words: list[str]) -> Callable[[Stopping], object]:
    worker = Worker(role, load(WorkerSettings, words, {}))

    def serve(stopping: Stopping) -> None:
        with _BUILDING:
            worker.__enter__()
        try:
            worker.serve(stopping)
        finally:
            worker.__exit__(None, None, None)

    return serve


@contextmanager
def thread_cluster(folder: Path) -> Iterator[ThreadCluster]:
    """A Redis and nobody yet."""
    before_s = sys.getswitchinterval()
    with redis_server() as url:
        made = ThreadCluster(url, folder)
        sys.setswitchinterval(_SWITCH_S)
        try:
            yield made
        finally:
            sys.setswitchinterval(before_s)
            made.close()
