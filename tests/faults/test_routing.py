"""Workers, gateway and Redis go and come back under load: no request fails, no token is wrong, predictions heal."""

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.clients import Stream, all_free, random_prompt, ready, status, until
from tests.support.processes import Cluster, cluster_at
from tests.support.redis import redis_server_at
from tests.support.reference import Reference

pytestmark = pytest.mark.system

WORKERS = ("decode-0", "decode-1", "prefill-0", "prefill-1")
N_TOKENS = 40
_AT_ONCE = 4


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen2")


@pytest.fixture(scope="module")
def asked(model: Path) -> list[tuple[list[int], list[int]]]:
    """Prompts that share beginnings, with what transformers answers."""
    rng, reference = random.Random(11), Reference(model)
    shared = [random_prompt(rng, 64) for _ in range(3)]
    prompts = [rng.choice(shared) + random_prompt(rng, 24) for _ in range(12)]
    return [(prompt, reference.generate(prompt, N_TOKENS)) for prompt in prompts]


@pytest.fixture(scope="module")
def redis_socket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("redis") / "redis.sock"


@pytest.fixture(scope="module")
def system(model: Path, redis_socket: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with redis_server_at(redis_socket) as redis_url:
        with cluster_at(redis_url, tmp_path_factory.mktemp("logs")) as processes:
            for name in WORKERS:
                start(processes, model, name)
            start_gateway(processes, model)
            processes.await_members(*WORKERS, "gateway-0")
            until(lambda: ready(url(processes), *WORKERS), "everybody is ready", timeout_s=60)
            yield processes


def start(processes: Cluster, model: Path, name: str) -> None:
    role = name.partition("-")[0]
    processes.start(
        role, name, model=model, served_model_name="m", dtype="float32", device_memory="64MiB", kvstore="off"
    )


def start_gateway(processes: Cluster, model: Path, name: str = "gateway-0") -> None:
    """Every prompt crosses both roles, also one that a decode worker knows."""
    flags = {"served_model_name": "m", "port": 0, "retry_wait_s": 30, "local_prefill_tokens": 0}
    processes.start("gateway", name, model=model, **flags)


def url(processes: Cluster) -> str:
    return processes.members()["gateway-0"].endpoint


class Load:
    """Keeps some streams open, and compares every answer."""

    def __init__(self, endpoint: str, asked: list[tuple[list[int], list[int]]], n_tokens: int) -> None:
        self._endpoint, self._asked, self._n_tokens = endpoint, asked, n_tokens
        self._numbers, self._stopping = itertools.count(), threading.Event()
        self.answered = 0
        self.wrong: list[object] = []
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(_AT_ONCE)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            prompt, expected = self._asked[next(self._numbers) % len(self._asked)]
            stream = Stream(self._endpoint, prompt, self._n_tokens)
            stream.wait(90)
            if stream.tokens[: len(expected)] != expected[: self._n_tokens] or stream.error or stream.broken:
                self.wrong.append((stream.error, stream.broken, len(stream.tokens)))
            self.answered += 1

    def more(self, answers: int) -> None:
        goal = self.answered + answers
        until(lambda: self.answered >= goal or bool(self.wrong), f"{answers} more answers", timeout_s=90)

    def finish(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(90)
        assert self.wrong == []


@contextmanager
def load(endpoint: str, asked: list[tuple[list[int], list[int]]], n_tokens: int = N_TOKENS) -> Iterator[Load]:
    one = Load(endpoint, asked, n_tokens)
    try:
        one.more(8)
        yield one
        one.more(8)
    finally:
        one.finish()


def test_killed_workers_take_no_stream_along(system: Cluster, model: Path, asked) -> None:
    before = system.members()
    streams = [Stream(url(system), prompt, 600) for prompt, _ in asked[:8]]
    until(lambda: all(len(s.tokens) >= 5 for s in streams), "all streams run")
    for name in ("decode-0", "prefill-1"):
        system.kill(name)
        start(system, model, name)
    young = [Stream(url(system), prompt, N_TOKENS) for prompt, _ in asked]
    for stream, (_, expected) in zip([*streams, *young], [*asked[:8], *asked], strict=True):
        stream.wait(90)
        assert (stream.error, stream.broken, len(stream.tokens)) == (None, False, stream.max_tokens)
        assert stream.tokens[:N_TOKENS] == expected
    system.await_members("decode-0", "prefill-1", besides=before)
    until(lambda: ready(url(system), *WORKERS), "everybody is back", timeout_s=60)
    replays = httpx.get(f"{url(system)}/status").json()["gateway"]["routing"]
    assert sum(count for series, count in replays.items() if "kind=replay" in series) >= 1
    until(lambda: all_free(url(system), *WORKERS), f"all pages free: {status(url(system))}")


def test_drained_workers_fail_nothing_and_keep_what_they_have(system: Cluster, asked) -> None:
    endpoint = url(system)
    with load(endpoint, asked) as running:
        for name in ("prefill-0", "decode-0"):
            assert httpx.post(f"{endpoint}/admin/workers/{name}/drain").status_code == 202
            running.more(12)
            until(lambda name=name: status(endpoint)[name]["draining"], f"{name} says that it drains")
            until(lambda name=name: all_free(endpoint, name), f"{name} has finished what it had")
            assert status(endpoint)[name]["pages"]["cached"] > 0
            assert httpx.post(f"{endpoint}/admin/workers/{name}/resume").status_code == 202
            until(lambda name=name: status(endpoint)[name]["state"] == "ready", f"{name} works again")


def test_a_rolling_restart_of_every_worker_fails_nothing(system: Cluster, model: Path, asked) -> None:
    with load(url(system), asked) as running:
        for name in WORKERS:
            before = system.members()
            assert system.stop(name, timeout_s=60) == 0
            start(system, model, name)
            system.await_members(name, besides=before)
            until(lambda: ready(url(system), *WORKERS), f"{name} is back", timeout_s=60)
            running.more(4)


def hit_totals(endpoint: str) -> tuple[float, float, float]:
    """Predicted hits, real ones, and the sum of the differences, since the gateway's start."""
    routing = httpx.get(f"{endpoint}/status").json()["gateway"]["routing"]
    names = ("predicted_hit_tokens_total", "actual_hit_tokens_total", "hit_prediction_error_tokens_total")
    predicted, actual, error = (routing.get(name, 0.0) for name in names)
    return predicted, actual, error


def converged(endpoint: str, running: Load) -> bool:
    """Whether predictions were right for the next few answers, within a block each way."""
    _, actual_before, error_before = hit_totals(endpoint)
    running.more(12)
    _, actual, error = hit_totals(endpoint)
    return actual > actual_before and error - error_before <= 0.1 * (actual - actual_before)


def test_predicted_hits_converge_after_a_worker_redis_and_a_gateway_were_restarted(
    system: Cluster, model: Path, redis_socket: Path, asked
) -> None:
    endpoint = url(system)
    with load(endpoint, asked, 8) as running:
        until(lambda: converged(endpoint, running), "predictions are right", timeout_s=60)
        before = system.members()
        assert system.stop("prefill-0", timeout_s=60) == 0
        start(system, model, "prefill-0")
        system.await_members("prefill-0", besides=before)
        until(lambda: converged(endpoint, running), "right again after a worker's restart", timeout_s=60)
        system.shut_down_redis()
        running.more(12)
        with redis_server_at(redis_socket):
            until(lambda: gauge(endpoint, "tree_connected") == 1, "Redis is back", timeout_s=60)
            until(lambda: gauge(endpoint, "tree_synced") == 1, "the tree is in sync", timeout_s=60)
            until(lambda: converged(endpoint, running), "right again after Redis' restart", timeout_s=60)
            start_gateway(system, model, "gateway-1")
            system.await_members("gateway-1")
            other = system.members()["gateway-1"].endpoint
            until(lambda: ready(other, *WORKERS), "another gateway is ready", timeout_s=60)
            with load(other, asked, 8) as there:
                until(lambda: converged(other, there), "a new gateway predicts as well", timeout_s=60)


def gauge(endpoint: str, name: str) -> float:
    return httpx.get(f"{endpoint}/status").json()["gateway"]["prompt_tree"][name]
