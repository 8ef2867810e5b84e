"""Tokens stay transformers' own when prompts are computed while their layers leave, whatever number of them does."""

import dataclasses
import random

import pytest

from services.worker.core.layer_offload import RING_LAYERS
from services.worker.model import make
from tests.support.driver import Driver
from tests.support.reference import Reference
from tests.support.threads import thread_cluster

pytestmark = pytest.mark.system

N_TOKENS, LAYERS = 40, 6


def test_prompts_whose_layers_leave_get_the_same_tokens(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make.PRESETS["tiny"]
    deep = dataclasses.replace(tiny, shape={**tiny.shape, "num_hidden_layers": LAYERS})
    monkeypatch.setitem(make.PRESETS, "tiny", deep)
    folder = make.make_model("tiny", tmp_path_factory.mktemp("models") / "deep", family="llama")
    reference = Reference(folder)
    rng = random.Random(4)
    vocab = reference.model.config.vocab_size
    prompts = [[rng.randrange(8, vocab) for _ in range(rng.randrange(200, 420))] for _ in range(10)]
    expected = [reference.generate(prompt, N_TOKENS) for prompt in prompts]
    with thread_cluster(tmp_path_factory.mktemp("logs")) as processes:
        common = {"model": folder, "dtype": "float32", "max_step_tokens": 128, "device_memory": "2MiB"}  # 1,360 tokens
        names = []
        for leaving in (*range(LAYERS + 1), "auto"):
            names.append(f"mixed-{leaving}")
            processes.start("mixed", names[-1], layer_offload=leaving, host_buffer="16MiB", **common)
        processes.await_members(*names)
        with Driver([processes.members()[name] for name in names]) as driver:
            for name in names:
                requests = [driver.send(name, prompt, max_tokens=N_TOKENS) for prompt in prompts]
                for outcome, tokens in zip(driver.finish(requests), expected, strict=True):
                    assert outcome.failed is None
                    assert outcome.tokens == tokens, name
                driver.until_all_free()
                counters = driver.reports[name].counters
                assert counters["load_failures_total"] == counters["parking_failures_total"] == 0
                assert driver.reports[name].gauges["parked_bytes"] == 0.0
                if name != "mixed-auto":  # two layers that leave would need as many pages as they free
                    assert (counters["layerwise_prompts_total"] > 0) is (int(name.removeprefix("mixed-")) > RING_LAYERS)
