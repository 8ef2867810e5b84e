"""kill -9 of any process in the middle of streams: everybody gets an answer, survivors serve on, nothing is lost."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.clients import Stream, all_free, random_prompt, ready, status, until
from tests.support.processes import Cluster, cluster
from tests.support.reference import Reference

pytestmark = pytest.mark.system

ANSWER_WITHIN_S = 10.0
LONG = 1200
"""Tokens of a stream that is still running when the kill comes."""


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen2")


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


@pytest.fixture(scope="module")
def system(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("logs")) as processes:
        for role in ("decode", "prefill"):
            start(processes, model, role)
        start_gateway(processes, model)
        processes.await_members("decode-0", "prefill-0", "gateway-0")
        until(lambda: ready(url(processes), "decode-0", "prefill-0"), "the system is ready")
        yield processes


def start(processes: Cluster, model: Path, role: str) -> None:
    processes.start(role, f"{role}-0", model=model, served_model_name="m", dtype="float32", device_memory="64MiB")


def start_gateway(processes: Cluster, model: Path) -> None:
    processes.start("gateway", "gateway-0", model=model, served_model_name="m", port=0, retry_wait_s=3)


def url(processes: Cluster) -> str:
    return processes.members()["gateway-0"].endpoint


def long_streams(processes: Cluster, count: int = 4) -> list[Stream]:
    rng = random.Random(count)
    streams = [Stream(url(processes), random_prompt(rng, 30), LONG) for _ in range(count)]
    until(lambda: all(len(s.tokens) >= 5 for s in streams), "all streams run")
    return streams


def assert_serves(processes: Cluster, reference: Reference) -> None:
    """A fresh request is answered with the right tokens, and every page comes back."""
    until(lambda: ready(url(processes)), "ready again", timeout_s=60)
    prompt = random_prompt(random.Random(99), 50)
    stream = Stream(url(processes), prompt, 12)
    stream.wait(30)
    assert stream.error is None
    assert stream.tokens == reference.generate(prompt, 12)
    until(lambda: all_free(url(processes), "prefill-0", "decode-0"), f"all pages free: {status(url(processes))}")


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_a_killed_worker_ends_its_streams_with_a_phase_and_rejoins(
    role: str, system: Cluster, model: Path, reference: Reference
) -> None:
    streams = long_streams(system)
    # Prompts on their way through the prefill worker, so that its death hits every phase.
    rng = random.Random(7)
    young = [Stream(url(system), random_prompt(rng, 1500), 400) for _ in range(6)]
    before = system.members()
    system.kill(f"{role}-0")
    for stream in [*streams, *young]:
        stream.wait(ANSWER_WITHIN_S if role == "decode" else 60)
        assert stream.answered and not stream.broken
        if stream.error is not None:
            assert f"{role}-0" in stream.error["message"] and "phase" in stream.error["message"]
        else:
            assert len(stream.tokens) == stream.max_tokens
    start(system, model, role)
    system.await_members(f"{role}-0", besides=before)
    assert_serves(system, reference)


def test_a_killed_prefill_worker_does_not_touch_running_streams(
    system: Cluster, model: Path, reference: Reference
) -> None:
    streams = long_streams(system)
    before = system.members()
    system.kill("prefill-0")
    for stream in streams:
        stream.wait(60)
        assert stream.error is None
        assert stream.tokens[:20] == reference.generate(stream.prompt, 20)
        assert len(stream.tokens) == LONG
    start(system, model, "prefill")
    system.await_members("prefill-0", besides=before)
    assert_serves(system, reference)


def test_a_killed_gateway_breaks_its_streams_and_the_workers_free_everything(
    system: Cluster, model: Path, reference: Reference
) -> None:
    streams = long_streams(system)
    before = system.members()
    system.kill("gateway-0")
    for stream in streams:
        stream.wait(ANSWER_WITHIN_S)
        assert stream.broken
    start_gateway(system, model)
    system.await_members("gateway-0", besides=before)
    assert_serves(system, reference)


def test_a_decode_worker_told_to_stop_finishes_its_streams_first(
    system: Cluster, model: Path, reference: Reference
) -> None:
    streams = long_streams(system)
    before = system.members()
    assert system.stop("decode-0", timeout_s=60) == 0
    for stream in streams:
        stream.wait(ANSWER_WITHIN_S)
        assert stream.error is None and len(stream.tokens) == LONG
    start(system, model, "decode")
    system.await_members("decode-0", besides=before)
    assert_serves(system, reference)


def test_twenty_percent_of_two_hundred_clients_leave_and_every_page_comes_back(
    system: Cluster, reference: Reference
) -> None:
    rng = random.Random(200)
    streams: list[Stream] = []
    for number in range(200):
        leave_after = rng.choice([0, 1, 3, 8]) if number % 5 == 0 else None
        streams.append(
            Stream(
                url(system), random_prompt(rng, rng.randrange(1, 120)), rng.randrange(1, 24), leave_after=leave_after
            )
        )
        until(lambda: sum(not s.answered for s in streams) < 24, "at most 24 at once", timeout_s=60)
    for stream in streams:
        stream.wait(60)
        assert stream.left or (stream.error is None and len(stream.tokens) == stream.max_tokens)
    for stream in streams[1:30:3]:
        if not stream.left:
            assert stream.tokens == reference.generate(stream.prompt, stream.max_tokens)
    assert sum(s.left for s in streams) >= 30
    assert_serves(system, reference)


def test_without_redis_everybody_who_is_there_serves_on(
    model: Path, reference: Reference, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with cluster(tmp_path_factory.mktemp("logs")) as processes:
        processes.start("mixed", "mixed-0", model=model, served_model_name="m", dtype="float32", device_memory="64MiB")
        start_gateway(processes, model)
        processes.await_members("mixed-0", "gateway-0")
        endpoint = url(processes)
        until(lambda: ready(endpoint), "ready")
        processes.shut_down_redis()
        prompt = random_prompt(random.Random(5), 40)
        for _ in range(3):
            stream = Stream(endpoint, prompt, LONG)  # longer than the membership's lease, in all
            stream.wait(60)
            assert stream.error is None
            assert stream.tokens[:12] == reference.generate(prompt, 12)
