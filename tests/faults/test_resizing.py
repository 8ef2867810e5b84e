"""Workers grow and shrink while they serve: answers stay those of transformers, and memory that is given up is really gone."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from common.units import MIB
from tests.faults.traffic import Traffic
from tests.parity.caching import Answers
from tests.support.clients import random_prompt
from tests.support.driver import Driver
from tests.support.processes import Cluster, cluster
from tests.support.reference import Reference

pytestmark = pytest.mark.system

DECODE, PREFILL, LATE = "decode-0", "prefill-0", "prefill-1"
START, SMALL, LARGE = 16 * MIB, 4 * MIB, 32 * MIB
LONG_TOKENS = 250
"""With the prompts 30 blocks; the 2 MiB that are left of the pool hold 256 blocks."""


def resident_bytes(pid: int) -> int:
    """What the file with a worker's pages takes, as the kernel counts it."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        with suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(path).startswith("/memfd:penstock-pages"):
                return os.stat(path).st_blocks * 512
    raise AssertionError(f"process {pid} has no pages")


def start(processes: Cluster, name: str, model: Path, device_memory: object = START) -> None:
    role = name.partition("-")[0]
    common = {"model": model, "dtype": "float32", "kvstore": "off", "transport": "shm"}
    processes.start(role, name, device_memory=device_memory, **common)


@pytest.fixture(scope="module")
def system(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Cluster, Traffic, Path]]:
    answers = Answers(tiny_model("llama"))
    with cluster(tmp_path_factory.mktemp("resizing")) as processes:
        for name in (DECODE, PREFILL):
            start(processes, name, answers.folder)
        prompts = [random_prompt(random.Random(number), 219) for number in range(24)]
        expected = [answers.to(prompt)[:6] for prompt in prompts]
        processes.await_members(DECODE, PREFILL)
        with Driver([processes.members()[name] for name in (DECODE, PREFILL)]) as driver:
            driver.until_reported(lambda: len(driver.reports[PREFILL].transports) == 1, "they are connected")
            yield processes, Traffic(driver, prompts, expected), answers.folder


def pool(driver: Driver, worker: str) -> tuple[int, int]:
    """Bytes that the pool takes, and that it shall take."""
    gauges = driver.reports[worker].gauges
    return int(gauges["pool_bytes"]), int(gauges["pool_target_bytes"])


def resize(processes: Cluster, traffic: Traffic, worker: str, n_bytes: int) -> None:
    """Order it amid traffic, and go on until the worker is there: then the system has what was given up."""
    said = traffic.driver.resize(worker, n_bytes)
    assert (said.problem, said.target_bytes) == ("", n_bytes)
    traffic.until(lambda: pool(traffic.driver, worker) == (n_bytes, n_bytes), f"{worker} has {n_bytes}")
    pid = processes.members()[worker].pid
    assert resident_bytes(pid) >= n_bytes
    traffic.until(lambda: resident_bytes(pid) < n_bytes + MIB, "no more than that is taken, but while a peer probes")


def test_workers_shrink_and_grow_under_load_and_answers_stay_right(system: tuple[Cluster, Traffic, Path]) -> None:
    processes, traffic, _ = system
    traffic.run(30)
    for worker, n_bytes in ((DECODE, SMALL), (PREFILL, SMALL), (DECODE, LARGE), (PREFILL, LARGE), (DECODE, START)):
        resize(processes, traffic, worker, n_bytes)
        traffic.run(20)
    traffic.finish()
    assert traffic.cached_tokens, "what was kept is still of use"


def test_answers_that_hold_more_than_is_left_end_rightly_and_their_pages_leave_unasked(
    system: tuple[Cluster, Traffic, Path],
) -> None:
    """Together they grow to more than the new size: some give way and are computed again."""
    processes, traffic, model = system
    driver, reference = traffic.driver, Reference(model)
    expected = [reference.generate(prompt, LONG_TOKENS) for prompt in traffic.prompts[:12]]
    resize(processes, traffic, DECODE, START)
    traffic.finish()
    requests = [driver.send(PREFILL, prompt, decode=DECODE, max_tokens=LONG_TOKENS) for prompt in traffic.prompts[:12]]
    driver.until(lambda: all(driver.outcomes[request].tokens for request in requests), "all are being drawn")
    said = driver.resize(DECODE, 2 * MIB)
    assert said.target_bytes == 2 * MIB < said.device_memory_bytes and said.leaving_pages
    for outcome, tokens in zip(driver.finish(requests), expected, strict=True):
        assert outcome.failed is None
        assert outcome.tokens == tokens
    resize(processes, traffic, DECODE, 2 * MIB)
    traffic.finish()


def test_who_connects_while_a_worker_changes_its_size_gets_what_there_is(system: tuple[Cluster, Traffic, Path]) -> None:
    processes, traffic, model = system
    driver = traffic.driver
    start(processes, LATE, model, "0.2%")
    sizes, turn = (SMALL, LARGE), 0
    while LATE not in processes.members():
        resize(processes, traffic, DECODE, sizes[turn % 2])
        turn += 1
    driver.add(processes.members()[LATE])
    resize(processes, traffic, DECODE, sizes[turn % 2])
    traffic.until(
        lambda: LATE in driver.reports and any(t.kind == "shm" for t in driver.reports[LATE].transports),
        "a way to decode",
    )
    resize(processes, traffic, DECODE, LARGE)
    requests = [driver.send(LATE, prompt, decode=DECODE, max_tokens=6) for prompt in traffic.prompts]
    for outcome, tokens in zip(driver.finish(requests), traffic.expected, strict=True):
        assert outcome.failed is None
        assert outcome.tokens == tokens
    traffic.finish()


def test_what_the_machine_has_not_is_refused_and_nothing_changes(system: tuple[Cluster, Traffic, Path]) -> None:
    _, traffic, _ = system
    before = pool(traffic.driver, DECODE)
    said = traffic.driver.resize(DECODE, 2**50)
    assert "1024.0 TiB" in said.problem
    assert (said.device_memory_bytes, said.target_bytes) == before
    assert "at least" in traffic.driver.resize(DECODE, 1).problem
    traffic.run(5)
    traffic.finish()


def test_an_operator_resizes_over_http_and_sees_how_far_it_is(system: tuple[Cluster, Traffic, Path]) -> None:
    processes, traffic, model = system
    processes.start("gateway", "gateway-0", model=model, port=0)
    processes.await_members("gateway-0")
    with httpx.Client(base_url=processes.members()["gateway-0"].endpoint, timeout=60.0) as client:
        while DECODE not in {w["id"] for w in client.get("/status").json()["workers"] if w["reported"]}:
            traffic.step()
        for size, n_bytes in (("6MiB", 6 * MIB), (12 * MIB, 12 * MIB)):
            answer = client.post(f"/admin/workers/{DECODE}/memory", json={"device_memory": size})
            assert answer.status_code in (200, 202)
            assert answer.json()["target_bytes"] == n_bytes
            traffic.until(lambda n_bytes=n_bytes: pool(traffic.driver, DECODE)[0] == n_bytes, "it is there")
        refused = client.post(f"/admin/workers/{DECODE}/memory", json={"device_memory": "2048T"})
        assert refused.status_code == 400 and "asked for" in refused.json()["error"]["message"]
        series = f'penstock_worker_pool_bytes{{worker="{DECODE}"}} '

        def shown() -> bool:
            page = client.get("/metrics").text
            return float(page.partition(series)[2].partition("\n")[0]) == 12 * MIB

        traffic.until(shown, "the gateway shows it")
    traffic.finish()
