"""Workers on one GPU grow and shrink while they serve: answers stay transformers', and the device has back what was given up."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from common.units import GIB, MIB
from tests.parity.prompts import CHUNK_TOKENS, twenty
from tests.support.driver import Driver
from tests.support.processes import cluster
from tests.support.reference import Reference

pytestmark = [
    pytest.mark.system,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

N_TOKENS = 24
PREFILL, DECODE = "prefill-0", "decode-0"
START, SMALL, LARGE = 2 * GIB, 512 * MIB, 4 * GIB
_SLACK = 256 * MIB
"""What engines may take or give back meanwhile."""


@pytest.fixture(scope="module")
def served(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Driver, list[list[int]], list[list[int]]]]:
    folder = tiny_model("qwen3")
    common = {
        "model": folder,
        "dtype": "float32",
        "device": "cuda",
        "device_memory": START,
        "max_step_tokens": CHUNK_TOKENS,
        "threads": 2,
        "transport": "cuda_ipc",
        "kvstore": "off",
    }
    with cluster(tmp_path_factory.mktemp("logs")) as processes:
        for name in (PREFILL, DECODE):
            processes.start(name.split("-")[0], name, **common)
        reference = Reference(folder)
        prompts = twenty(reference.model.config.vocab_size)
        expected = [reference.generate(prompt, N_TOKENS) for prompt in prompts]
        processes.await_members(PREFILL, DECODE)
        with Driver([processes.members()[name] for name in (PREFILL, DECODE)]) as driver:
            driver.until(
                lambda: PREFILL in driver.reports and bool(driver.reports[PREFILL].transports), "they are connected"
            )
            warm = [driver.send(PREFILL, prompt, decode=DECODE, max_tokens=N_TOKENS) for prompt in prompts]
            driver.finish(warm)
            driver.refresh()  # kernels are compiled and workspaces made: memory moves by pages alone from now on
            yield driver, prompts, expected


def pool(driver: Driver, worker: str) -> tuple[int, int]:
    """Bytes that the pool takes, and that it shall take."""
    gauges = driver.reports[worker].gauges
    return int(gauges["pool_bytes"]), int(gauges["pool_target_bytes"])


def near(pool_bytes: tuple[int, int], wanted_bytes: int) -> bool:
    """Chunks are of about 64 MiB, and only whole ones are taken."""
    return pool_bytes[0] == pool_bytes[1] and wanted_bytes - 128 * MIB <= pool_bytes[0] <= wanted_bytes


@pytest.mark.parametrize("worker", [DECODE, PREFILL])
def test_a_worker_shrinks_and_grows_under_load_and_the_device_has_what_it_gave_up(served, worker: str) -> None:
    driver, prompts, expected = served
    for n_bytes in (SMALL, LARGE, START):
        before_free, before_pool = torch.cuda.mem_get_info()[0], pool(driver, worker)[0]
        requests = [driver.send(PREFILL, prompt, decode=DECODE, max_tokens=N_TOKENS) for prompt in prompts]
        driver.until(lambda requests=requests: bool(driver.outcomes[requests[0]].tokens), "answers are being drawn")
        said = driver.resize(worker, n_bytes)
        assert said.problem == ""
        for outcome, tokens in zip(driver.finish(requests), expected, strict=True):
            assert outcome.failed is None, n_bytes
            assert outcome.tokens == tokens, n_bytes
        driver.until_reported(lambda n_bytes=n_bytes: near(pool(driver, worker), n_bytes), f"{worker} has {n_bytes}")
        gained = before_pool - pool(driver, worker)[0]

        def moved(gained: int = gained, before: int = before_free) -> bool:
            return abs(torch.cuda.mem_get_info()[0] - before - gained) < _SLACK

        driver.until(moved, f"the device has {gained} bytes more than before")
    driver.until_all_free()


def test_after_resizing_a_new_pool_is_used_to_its_end(served) -> None:
    """Enough prompts at once that pages which have just come are handed over through the peer's mapping."""
    driver, prompts, expected = served
    for n_bytes in (SMALL, LARGE):
        driver.resize(DECODE, n_bytes)
        requests = [driver.send(PREFILL, prompt, decode=DECODE, max_tokens=N_TOKENS) for prompt in prompts * 3]
        for outcome, tokens in zip(driver.finish(requests), expected * 3, strict=True):
            assert outcome.failed is None
            assert outcome.tokens == tokens
    driver.until_all_free()


def test_more_than_the_device_has_is_refused_with_the_numbers(served) -> None:
    driver, _, _ = served
    before = pool(driver, DECODE)
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    for n_bytes in (free_bytes + 16 * GIB, 4 * total_bytes):
        said = driver.resize(DECODE, n_bytes)
        assert "asked for" in said.problem
        assert (said.device_memory_bytes, said.target_bytes) == before


def test_a_share_is_of_all_that_the_process_takes(served, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Beside the others' pools."""
    del served
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    with cluster(tmp_path) as processes:
        processes.start(
            "mixed",
            "mixed-0",
            model=tiny_model("qwen3"),
            dtype="float32",
            device="cuda",
            device_memory="20%",
            threads=2,
        )
        processes.await_members("mixed-0")
        with Driver([processes.members()["mixed-0"]]) as driver:
            requests = [driver.send("mixed-0", list(range(8, 200)), max_tokens=N_TOKENS) for _ in range(40)]
            assert all(outcome.failed is None for outcome in driver.finish(requests))
            taken_bytes = free_bytes - torch.cuda.mem_get_info()[0]
            driver.refresh()
            pages_bytes = pool(driver, "mixed-0")[0]
    assert pages_bytes < taken_bytes <= total_bytes // 5 + _SLACK
    assert pages_bytes > total_bytes // 5 - 8 * GIB
