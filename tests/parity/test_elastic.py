"""Tokens stay transformers' own while KV and scratch share one memory, and memory that nobody uses goes to the system."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from common.units import MIB
from tests.faults.test_resizing import resident_bytes
from tests.support.driver import Driver, Outcome
from tests.support.processes import cluster
from tests.support.reference import Reference

pytestmark = pytest.mark.system

N_TOKENS = 12
MEMORY = 24 * MIB


def test_tokens_are_right_and_spare_memory_goes_and_comes(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tiny_model("qwen3")
    reference, rng = Reference(folder), random.Random(4)
    prompts = [[rng.randrange(8, 1500) for _ in range(rng.choice((20, 300, 900)))] for _ in range(12)]
    expected = [reference.generate(prompt, N_TOKENS) for prompt in prompts]
    with cluster(tmp_path_factory.mktemp("elastic")) as processes:
        common = {"model": folder, "dtype": "float32", "kvstore": "off", "max_step_tokens": 1024, "caching": 0}
        processes.start("mixed", "static", device_memory=MEMORY, elastic="static", **common)
        processes.start("mixed", "kv", device_memory=MEMORY, elastic="kv", spare_memory="release", **common)
        processes.await_members("static", "kv")
        with Driver([processes.members()[name] for name in ("static", "kv")]) as driver:
            for worker in ("static", "kv", "kv"):
                requests = [driver.send(worker, prompt, max_tokens=N_TOKENS) for prompt in prompts]
                check(driver.finish(requests), expected)
                pid = processes.members()["kv"].pid
                driver.until(lambda pid=pid: resident_bytes(pid) <= MEMORY // 2, "the system has what nobody uses")  # type: ignore[misc]  # bound now
            lent = driver.reports["static"].pages.lent
            assert 0 < lent < driver.reports["static"].pages.total
            assert "memory are lent" in driver.resize("kv", 2 * MEMORY).problem


def check(outcomes: list[Outcome], expected: list[list[int]]) -> None:
    for outcome, tokens in zip(outcomes, expected, strict=True):
        assert outcome.failed is None
        assert outcome.tokens == tokens
