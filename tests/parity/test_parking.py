"""Tokens stay transformers' own when requests are parked in mid-answer and come back, and none of them is computed again."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.driver import Driver
from tests.support.reference import Reference
from tests.support.threads import thread_cluster

pytestmark = pytest.mark.system

N_TOKENS = 70


@pytest.fixture(scope="module")
def answers(tiny_model: Callable[[str], Path]) -> list[tuple[list[int], list[int]]]:
    """Prompts and what transformers answers."""
    reference, rng = Reference(tiny_model("llama")), random.Random(4)
    vocab = reference.model.config.vocab_size
    prompts = [[rng.randrange(8, vocab) for _ in range(rng.randrange(220, 340))] for _ in range(20)]
    return [(prompt, reference.generate(prompt, N_TOKENS)) for prompt in prompts]


@pytest.mark.parametrize("plan_ahead", ["off", "on"])
def test_parked_requests_get_the_same_tokens(
    plan_ahead: str,
    answers: list[tuple[list[int], list[int]]],
    tiny_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tiny_model("llama")
    with thread_cluster(tmp_path_factory.mktemp("logs")) as processes:
        common = {"model": folder, "dtype": "float32", "max_step_tokens": 128, "plan_ahead": plan_ahead}
        scarce = {"device_memory": "2MiB", "host_buffer": "8MiB", **common}  # 4,096 tokens for 20 times about 350
        processes.start("decode", "decode-0", caching=2, **scarce)
        processes.start("prefill", "prefill-0", device_memory="2MiB", **common)
        processes.start("mixed", "mixed-0", caching=0, **scarce)
        names = ("decode-0", "prefill-0", "mixed-0")
        processes.await_members(*names)
        with Driver([processes.members()[name] for name in names]) as driver:
            driver.until(lambda: bool(driver.reports.get("prefill-0") and driver.reports["prefill-0"].transports), "up")
            for to, decode, parks in (("prefill-0", "decode-0", "decode-0"), ("mixed-0", None, "mixed-0")):
                requests = [driver.send(to, prompt, decode=decode, max_tokens=N_TOKENS) for prompt, _ in answers]
                for outcome, (_, tokens) in zip(driver.finish(requests), answers, strict=True):
                    assert outcome.failed is None
                    assert outcome.tokens == tokens
                driver.until_all_free()
                counters = driver.reports[parks].counters
                assert counters["parked_total"] == counters["restored_total"] == counters["preemptions_total"] > 0
                assert driver.reports[parks].gauges["parked_bytes"] == 0.0
