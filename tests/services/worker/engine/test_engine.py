"""Laws of the engine beyond parity: announcements, independence from neighbours and from what memory held."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from common.ids import RequestId
from common.messages.requests import Sampling
from kvstore.index.page_table import PageTable
from services.worker.core.plan import Segment, StepPlan
from services.worker.engine.engine import TorchEngine
from services.worker.model.load import load_model
from tests.services.worker.engine.driving import Driver
from tests.services.worker.engine.test_parity import prompt_of

Checkpoints = Callable[[str], Path]


def test_every_layer_is_announced_in_order_when_its_pages_are_written(checkpoint: Checkpoints) -> None:
    driver = Driver(load_model(checkpoint("qwen2")))
    request = driver.add(prompt_of(20, seed=1), 2)
    seen: list[tuple[int, list[bool]]] = []

    def on_layer(layer: int) -> None:
        table = driver.sequences[request].table.ids
        written = [bool(driver.pool[int(table[one, 0])].any()) for one in range(driver.layout.layers)]
        seen.append((layer, written))

    driver.step(on_layer=on_layer)
    assert seen == [(0, [True, False]), (1, [True, True])]


def test_nothing_is_announced_when_no_segment_is_streamed(checkpoint: Checkpoints) -> None:
    driver = Driver(load_model(checkpoint("qwen2")))
    driver.add(prompt_of(20, seed=1), 3)
    driver.step()
    seen: list[int] = []
    driver.step(on_layer=seen.append)
    assert seen == []


@pytest.mark.long
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_what_pages_held_before_changes_nothing(family: str, checkpoint: Checkpoints) -> None:
    outputs = []
    for garbage in (0.0, float("nan")):
        driver = Driver(load_model(checkpoint(family)), garbage=garbage)
        requests = [driver.add(prompt_of(tokens, seed=2), 20) for tokens in (1, 5, 16, 40, 70)]
        driver.run()
        outputs.append([driver.output(request) for request in requests])
    assert outputs[0] == outputs[1]


@pytest.mark.long
def test_the_size_of_chunks_changes_nothing(checkpoint: Checkpoints) -> None:
    outputs = []
    for chunk_tokens in (7, 16, 64, 512):
        driver = Driver(load_model(checkpoint("gemma3")))
        request = driver.add(prompt_of(150, seed=3), 12)
        driver.run(chunk_tokens)
        outputs.append(driver.output(request))
    assert all(output == outputs[0] for output in outputs)


def test_a_sampled_answer_does_not_depend_on_its_neighbours(checkpoint: Checkpoints) -> None:
    model = load_model(checkpoint("qwen3"))
    alone = Driver(model)
    lonely = alone.add(prompt_of(30, seed=4), 16, temperature=0.9, top_p=0.95, seed=11)
    alone.run()
    crowded = Driver(model)
    for tokens in (3, 90):
        crowded.add(prompt_of(tokens, seed=5), 30, temperature=1.0, seed=tokens)
    crowded.step()
    busy = crowded.add(prompt_of(30, seed=4), 16, temperature=0.9, top_p=0.95, seed=11)
    crowded.run()
    assert crowded.output(busy) == alone.output(lonely)


def test_bfloat16_pages_stay_close_to_float32(checkpoint: Checkpoints) -> None:
    logprobs = []
    for dtype in ("float32", "bfloat16"):
        driver = Driver(load_model(checkpoint("llama"), dtype))
        request = driver.add(prompt_of(100, seed=6), 1, logprobs=0)
        driver.run()
        sampled = driver.sequences[request].sampled[0]
        assert sampled.logprob is not None
        logprobs.append(sampled.logprob.logprob)
    assert logprobs[0] == pytest.approx(logprobs[1], abs=0.2)


def test_pages_that_do_not_fit_the_model_are_refused(checkpoint: Checkpoints) -> None:
    model = load_model(checkpoint("qwen2"))
    with pytest.raises(ConfigError, match="do not fit qwen2"):
        TorchEngine(model, torch.zeros(8, 16, 2, 2, 32), model.layout)
    with pytest.raises(ConfigError, match="bfloat16"):
        TorchEngine(model, torch.zeros(8, 16, 2, 2, 16, dtype=torch.bfloat16), model.layout)


def test_steps_after_a_resize_use_the_pages_that_came(checkpoint: Checkpoints) -> None:
    model = load_model(checkpoint("llama"))
    pool = torch.zeros(64 * model.layout.layers, 16, 2, model.layout.kv_heads, model.layout.head_dim)
    engine = TorchEngine(model, pool[: model.layout.layers], model.layout)
    engine.use_pages(pool)
    table = PageTable(model.layout.layers)
    table.append(np.arange(len(pool) - model.layout.layers, len(pool), dtype=np.int32).reshape(1, -1))
    segment = Segment(RequestId("r"), prompt_of(9, seed=1), 9, 0, 9, table, Sampling(max_tokens=1), True)
    engine.step(StepPlan(1, (segment,)))
    assert bool(pool[-model.layout.layers :].any(dim=(1, 2, 3, 4)).all())
