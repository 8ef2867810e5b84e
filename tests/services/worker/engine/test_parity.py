"""Greedy tokens of the engine equal those of `transformers.generate` in float32, for every family."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.worker.model.load import load_model
from services.worker.model.make import FAMILIES
from services.worker.model.packing import LinearPath
from tests.services.worker.engine.driving import Driver

VOCAB_TOKENS = 1536
OUTPUT_TOKENS = 24


def prompt_of(tokens: int, seed: int) -> list[int]:
    chance = random.Random(f"{tokens}/{seed}")
    return [chance.randrange(5, VOCAB_TOKENS) for _ in range(tokens)]


def generate(folder: Path, prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
    """The reference, one prompt at a time, on exactly `output_tokens` tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=output_tokens, do_sample=False)
        found.append(out[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("family", [FAMILIES[0], *(pytest.param(one, marks=pytest.mark.long) for one in FAMILIES[1:])])
def test_a_ragged_batch_of_16_that_joins_while_others_decode_equals_generate(
    family: str, checkpoint: Callable[[str], Path]
) -> None:
    # 1 token, multiples of the block, one more and one less, several chunks of 64, far beyond the windows of 32 and 48.
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 128, 129, 200]
    prompts = [prompt_of(tokens, seed=tokens) for tokens in lengths]
    driver = Driver(load_model(checkpoint(family)))
    requests = []
    for prompt in prompts:
        requests.append(driver.add(prompt, OUTPUT_TOKENS))
        driver.step()
    driver.run()
    assert [driver.output(request) for request in requests] == generate(checkpoint(family), prompts, OUTPUT_TOKENS)


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])  # all there is to see, and windows of two kinds
def test_one_long_answer_equals_generate(family: str, checkpoint: Callable[[str], Path]) -> None:
    driver = Driver(load_model(checkpoint(family)))
    request = driver.add(prompt_of(40, seed=0), 120)
    driver.run()
    assert [driver.output(request)] == generate(checkpoint(family), [prompt_of(40, seed=0)], 120)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_plain_modules_without_packing_equal_generate_too(
    family: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.worker.model.load.choose_path", lambda device: LinearPath.PLAIN)
    driver = Driver(load_model(checkpoint(family)))
    prompts = [prompt_of(tokens, seed=7) for tokens in (1, 20, 70)]
    requests = [driver.add(prompt, 12) for prompt in prompts]
    driver.run()
    assert [driver.output(request) for request in requests] == generate(checkpoint(family), prompts, 12)
