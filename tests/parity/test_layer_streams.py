"""Tokens stay transformers' own when a prefill worker has room for less than half of a prompt, and its layers go to the decode worker."""

import random
from pathlib import Path

import pytest

from common.messages.liveness import Member
from services.worker.model.make import make_model
from tests.support.driver import Driver
from tests.support.reference import Reference
from tests.support.threads import ThreadCluster, thread_cluster

pytestmark = pytest.mark.system

N_TOKENS, LAYERS = 12, 8
PREFILL_MEMORY = "2MiB"
"""256 tokens of the deep model."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("deep", tmp_path_factory.mktemp("models") / "deep", family="llama")


Asked = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def asked(model: Path) -> Asked:
    """Prompts that share a beginning, and what transformers answers."""
    reference, rng = Reference(model), random.Random(11)
    vocab = reference.model.config.vocab_size

    def some(count: int) -> list[int]:
        return [rng.randrange(8, vocab) for _ in range(count)]

    shared = some(100)
    prompts = [some(700), some(60), shared + some(30), shared + some(250), some(512), shared + some(300), some(1)]
    return [(prompt, reference.generate(prompt, N_TOKENS)) for prompt in prompts]


def served(tmp_path: Path, model: Path, asked: Asked, **flags: object) -> dict[str, float]:
    """Ask all of it at once, twice; the prefill worker's counters afterwards."""
    common = {"model": model, "dtype": "float32", "max_context_tokens": 1024, "max_step_tokens": 128, **flags}
    with thread_cluster(tmp_path) as workers:
        members = both(workers, common)
        with Driver(members) as driver:
            driver.until_reported(lambda: len(driver.reports["prefill-0"].transports) == 1, "they are connected")
            for _ in range(2):
                requests = [
                    driver.send("prefill-0", prompt, decode="decode-0", max_tokens=N_TOKENS) for prompt, _ in asked
                ]
                for outcome, (_, tokens) in zip(driver.finish(requests, timeout_s=60.0), asked, strict=True):
                    assert outcome.failed is None
                    assert outcome.tokens == tokens
            driver.until_all_free()
            return dict(driver.reports["prefill-0"].counters)


def both(workers: ThreadCluster, common: dict[str, object]) -> list[Member]:
    plain = {**common, "layer_offload": "off", "elastic": "off", "device_memory": "16MiB"}
    return [
        workers.start("decode", "decode-0", **plain),
        workers.start("prefill", "prefill-0", **{"device_memory": PREFILL_MEMORY, **common}),
    ]


@pytest.mark.parametrize(("transport", "caching"), [("shm", 3), ("tcp", 0)])
def test_prompts_of_twice_the_pool_get_the_same_tokens(
    tmp_path: Path, model: Path, asked: Asked, transport: str, caching: int
) -> None:
    counters = served(tmp_path, model, asked, transport=transport, caching=caching, layer_offload="auto")
    assert counters["layerwise_prompts_total"] >= 8  # four of them do not fit at all
    assert counters["layerwise_layers_total"] == LAYERS * counters["layerwise_prompts_total"]


def test_as_many_layers_leave_as_was_asked_for(tmp_path: Path, model: Path, asked: Asked) -> None:
    counters = served(
        tmp_path, model, asked, transport="shm", layer_offload=6, kv_layout="virtual", device_memory="4MiB"
    )
    assert counters["layerwise_prompts_total"] > 0
    assert counters["layerwise_layers_total"] == 6 * counters["layerwise_prompts_total"]


def test_with_scratch_out_of_the_same_memory(tmp_path: Path, model: Path, asked: Asked) -> None:
    counters = served(tmp_path, model, asked, transport="shm", elastic="full", device_memory="10MiB")
    assert counters["layerwise_prompts_total"] > 0
