"""More KV than the KV store can hold, asked for at random: nothing leaks, the hit rate is steady, every token is right."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.traffic import PREFILL, PROMPT_TOKENS, STORE, serving
from tests.support.clients import random_prompt

pytestmark = pytest.mark.system

HOST_BLOCKS = 512
"""4 MiB of the tiny model."""
_PREFIXES, _PREFIX_TOKENS, _TAILS = 8, 64, 53
"""8 * 4 + 53 * 10 blocks: 1.1 times what fits."""
_QUARTER = 150
"""Requests."""
_BAND = 0.12


def working_set() -> list[list[int]]:
    rng = random.Random(11)
    prefixes = [random_prompt(rng, _PREFIX_TOKENS) for _ in range(_PREFIXES)]
    return [
        prefixes[number % _PREFIXES] + random_prompt(rng, PROMPT_TOKENS - _PREFIX_TOKENS) for number in range(_TAILS)
    ]


def test_churn_above_the_stores_capacity(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with serving(tmp_path, tiny_model("llama"), working_set(), host_memory="4MiB") as (_, traffic):
        reports, rates = traffic.driver.reports, list[float]()
        for _ in range(4):
            cached, asked = traffic.cached_tokens, traffic.asked_tokens
            traffic.run(_QUARTER)
            rates.append((traffic.cached_tokens - cached) / (traffic.asked_tokens - asked))
        traffic.finish()
        assert rates[3] == pytest.approx(rates[1], abs=_BAND), rates
        assert 0.5 < rates[3] < 0.95, "more than a worker could keep is reused, but not everything"
        store, worker = reports[STORE], reports[PREFILL]
        assert store.gauges["blocks{tier=host}"] <= HOST_BLOCKS == store.pages.total // 2
        assert store.counters["evicted_blocks_total"] > 0
        hits = sum(count for name, count in worker.counters.items() if name.startswith("hit_tokens_total"))
        assert hits == traffic.cached_tokens
        assert hits + worker.counters["missed_tokens_total"] == traffic.asked_tokens
        assert worker.counters["hit_tokens_total{tier=host}"] > 0
        assert worker.counters["load_failures_total"] == 0
