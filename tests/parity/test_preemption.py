"""Tokens stay transformers' own when pages run out and sequences are computed again, greedy and seeded alike."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.driver import Driver
from tests.support.reference import Reference
from tests.support.threads import thread_cluster

pytestmark = pytest.mark.system

N_TOKENS = 100


def test_preempted_requests_get_the_same_tokens(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tiny_model("llama")
    reference = Reference(folder)
    rng = random.Random(4)
    vocab = reference.model.config.vocab_size
    prompts = [[rng.randrange(8, vocab) for _ in range(rng.randrange(120, 200))] for _ in range(24)]
    expected = [reference.generate(prompt, N_TOKENS) for prompt in prompts]
    with thread_cluster(tmp_path_factory.mktemp("logs")) as processes:
        common = {"model": folder, "dtype": "float32", "max_step_tokens": 128}
        processes.start("decode", "decode-0", device_memory="2MiB", **common)  # 4,096 tokens for 24 times about 260
        processes.start("prefill", "prefill-0", device_memory="2MiB", **common)
        processes.start("mixed", "scarce", device_memory="2MiB", **common)
        processes.start("mixed", "plenty", device_memory="64MiB", **common)
        names = ("decode-0", "prefill-0", "scarce", "plenty")
        processes.await_members(*names)
        with Driver([processes.members()[name] for name in names]) as driver:
            driver.until(lambda: bool(driver.reports.get("prefill-0") and driver.reports["prefill-0"].transports), "up")
            for to, decode, preempted in (("prefill-0", "decode-0", "decode-0"), ("scarce", None, "scarce")):
                requests = [driver.send(to, prompt, decode=decode, max_tokens=N_TOKENS) for prompt in prompts]
                for outcome, tokens in zip(driver.finish(requests), expected, strict=True):
                    assert outcome.failed is None
                    assert outcome.tokens == tokens
                driver.until_all_free()
                assert driver.reports[preempted].counters["preemptions_total"] > 0, f"{preempted} had room for all"
            drawn = [
                [
                    driver.send(to, prompt, max_tokens=N_TOKENS, temperature=0.8, seed=number, frequency_penalty=0.3)
                    for number, prompt in enumerate(prompts)
                ]
                for to in ("scarce", "plenty")
            ]
            scarce, plenty = (driver.finish(requests) for requests in drawn)
            assert [o.tokens for o in scarce] == [o.tokens for o in plenty]
            driver.until_all_free()
