"""Laws of what the engine takes of its scratch. That a step takes no more than its terms say, the engine itself asserts."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from services.worker.elastic_memory import own_scratch_bytes
from services.worker.engine.engine import TorchEngine
from services.worker.engine.scratch import ALIGNMENT_BYTES, OutOfScratch
from services.worker.model.load import load_model
from services.worker.model.make import FAMILIES
from tests.services.worker.engine.driving import Driver
from tests.services.worker.engine.test_parity import prompt_of

Checkpoints = Callable[[str], Path]


@pytest.fixture(autouse=True)
def few_keys_in_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("spans", "engine", "view_reads"):
        monkeypatch.setattr(f"services.worker.engine.{module}.GROUP_KEYS", 96)


def lend_what_it_needs(driver: Driver, chunk_tokens: int) -> None:
    """Give the engine an arena that is just large enough for the next step."""
    assert isinstance(driver.engine, TorchEngine)
    running = [request for request, one in driver.sequences.items() if not one.done]
    segments = [driver.segment(request, chunk_tokens) for request in running]
    rows = sum(segment.count for segment in segments)
    longest_keys = max(segment.start + segment.count for segment in segments)
    n_bytes = driver.engine.scratch_terms.needs_bytes(rows, longest_keys)
    driver.engine.use_scratch(torch.empty(n_bytes + ALIGNMENT_BYTES, dtype=torch.uint8))


def random_steps(driver: Driver, seed: int, *, lend: bool) -> list[list[int]]:
    """Outputs of sequences that join at random while others draw, with chunks of random size."""
    chance = random.Random(seed)
    requests = []
    while len(requests) < 6 or any(not one.done for one in driver.sequences.values()):
        if len(requests) < 6:
            requests.append(driver.add(prompt_of(chance.choice((1, 15, 40, 300)), seed=len(requests)), 4))
        chunk_tokens = chance.choice((3, 32, 400))
        if lend:
            lend_what_it_needs(driver, chunk_tokens)
        driver.step(chunk_tokens)
    return [driver.output(request) for request in requests]


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_in_an_arena_of_just_what_they_need_equal_those_in_memory_of_their_own(
    family: str, dtype: str, checkpoint: Checkpoints
) -> None:
    model = load_model(checkpoint(family), dtype)
    assert random_steps(Driver(model), seed=1, lend=True) == random_steps(Driver(model), seed=1, lend=False)


def test_an_engine_keeps_what_its_largest_step_took_until_it_is_lent_an_arena(checkpoint: Checkpoints) -> None:
    driver = Driver(load_model(checkpoint("qwen3")))
    assert isinstance(driver.engine, TorchEngine)
    driver.add(prompt_of(40, seed=0), 2)
    assert own_scratch_bytes(driver.engine) == 0
    driver.step(40)
    largest_bytes = driver.engine.scratch_peak_bytes
    driver.step(1)
    assert own_scratch_bytes(driver.engine) == largest_bytes > driver.engine.scratch_peak_bytes
    driver.engine.use_scratch(torch.empty(4096, dtype=torch.uint8))
    assert own_scratch_bytes(driver.engine) == 0


def test_the_terms_of_one_long_prompt_are_exact_up_to_their_fixed_part(checkpoint: Checkpoints) -> None:
    driver = Driver(load_model(checkpoint("qwen3")))
    assert isinstance(driver.engine, TorchEngine)
    terms = driver.engine.scratch_terms
    memory = torch.empty(terms.needs_bytes(320, 320) + ALIGNMENT_BYTES, dtype=torch.uint8)
    driver.engine.use_scratch(memory)
    driver.add(prompt_of(320, seed=0), 1)
    driver.engine.use_scratch(memory[: -terms.fixed_bytes - 2 * ALIGNMENT_BYTES])
    with pytest.raises(OutOfScratch):
        driver.step(320)
    driver.engine.use_scratch(memory)
    driver.step(320)
