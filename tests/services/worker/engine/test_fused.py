"""The engine of a GPU gives transformers' tokens: in Triton's interpreter here, on the device where there is one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.kv_layout import KvLayout
from services.worker.core.plan import StepPlan
from services.worker.engine.fused.graphs import decode_ladder, doubling_ladder
from services.worker.engine.make import EngineLimits
from services.worker.engine.rehearsal import long_steps
from services.worker.model.load import LoadedModel, load_model
from services.worker.model.make import FAMILIES, make_model
from services.worker.model.packing import LinearPath
from tests.services.worker.engine.driving import Driver
from tests.services.worker.engine.test_parity import generate, prompt_of

on_gpu = pytest.mark.gpu


def fused(folder: Path, device: torch.device, dtype: str = "float32") -> LoadedModel:
    return load_model(folder, dtype, str(device), path=LinearPath.FUSED)


def answers(driver: Driver, prompts: list[list[int]], output_tokens: int, **sampling: object) -> list[list[int]]:
    requests = [driver.add(prompt, output_tokens, **sampling) for prompt in prompts]
    driver.run()
    return [driver.output(request) for request in requests]


@pytest.mark.parametrize(
    ("family", "whole_blocks"), [*((family, True) for family in FAMILIES), ("mistral", False), ("gemma3", False)]
)
@pytest.mark.system  # half a minute each in the interpreter, when the machine is quiet
def test_a_few_tokens_of_every_family_equal_generate(
    family: str, whole_blocks: bool, checkpoint: Callable[[str], Path], device: torch.device
) -> None:
    prompts = [prompt_of(tokens, seed=tokens) for tokens in (1, 17, 36)]
    driver = Driver(fused(checkpoint(family), device), pages=64, garbage=float("nan"), whole_blocks=whole_blocks)
    assert answers(driver, prompts, 3) == generate(checkpoint(family), prompts, 3)


@pytest.mark.long
@pytest.mark.parametrize("whole_blocks", [True, pytest.param(False, marks=pytest.mark.system)])
def test_two_tokens_equal_generate(whole_blocks: bool, checkpoint: Callable[[str], Path], device: torch.device) -> None:
    prompts = [prompt_of(tokens, seed=tokens) for tokens in (1, 17)]
    driver = Driver(fused(checkpoint("qwen3"), device), pages=64, garbage=float("nan"), whole_blocks=whole_blocks)
    assert answers(driver, prompts, 2) == generate(checkpoint("qwen3"), prompts, 2)


@pytest.mark.system  # slow in the interpreter
def test_drawn_tokens_are_those_of_the_processors_engine(
    checkpoint: Callable[[str], Path], device: torch.device
) -> None:
    prompts = [prompt_of(tokens, seed=3) for tokens in (5, 9)]
    how = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 11}
    expected = answers(Driver(load_model(checkpoint("qwen2"))), prompts, 4, **how)
    driver = Driver(fused(checkpoint("qwen2"), device), pages=64, whole_blocks=True)
    assert answers(driver, prompts, 4, **how) == expected


@pytest.mark.long
def test_steps_after_a_resize_use_the_view_that_came(checkpoint: Callable[[str], Path], device: torch.device) -> None:
    driver = Driver(fused(checkpoint("qwen2"), device), pages=64)
    before, larger = driver.pool.clone(), torch.cat([driver.pool, torch.zeros_like(driver.pool)])
    driver.engine.use_pages(larger)
    request = driver.add(prompt_of(9, seed=1), 1)
    driver.step()
    assert torch.equal(driver.pool, before), "the old view is not written any more"
    assert bool(larger[driver.sequences[request].table.ids[:, 0]].any(dim=(1, 2, 3, 4)).all())


@pytest.mark.long
def test_penalties_and_logprobs_come_from_the_host(checkpoint: Callable[[str], Path], device: torch.device) -> None:
    prompts = [prompt_of(12, seed=1)]
    how = {"repetition_penalty": 1.3, "logprobs": 2}
    plain, driver = Driver(load_model(checkpoint("qwen2"))), Driver(fused(checkpoint("qwen2"), device), pages=64)
    assert answers(driver, prompts, 3, **how) == answers(plain, prompts, 3, **how)
    (one,), (other,) = driver.sequences.values(), plain.sequences.values()
    for mine, theirs in zip(one.sampled, other.sampled, strict=True):
        assert mine.logprob is not None and theirs.logprob is not None
        assert mine.logprob.logprob == pytest.approx(theirs.logprob.logprob, abs=1e-4)


@pytest.mark.long
def test_a_step_may_go_on_with_tokens_that_the_host_does_not_know(
    checkpoint: Callable[[str], Path], device: torch.device
) -> None:
    prompt = prompt_of(7, seed=5)
    driver = Driver(fused(checkpoint("qwen2"), device), pages=64, whole_blocks=True)
    request = driver.add(prompt, 8)
    sequence = driver.sequences[request]
    first = driver.engine.launch(StepPlan(1, (driver.segment(request, len(prompt)),)), None, None)
    sequence.computed = len(prompt)
    launched = [first]
    for number in range(2, 5):
        launched.append(driver.engine.launch(StepPlan(number, (driver.pending_segment(request),)), None, None))
        sequence.computed += 1
        drawn = driver.engine.collect(launched[-2]).sampled[0].token
        sequence.tokens.append(drawn)
    sequence.tokens.append(driver.engine.collect(launched[-1]).sampled[0].token)
    assert sequence.tokens[len(prompt) :] == generate(checkpoint("qwen2"), [prompt], 4)[0]


def test_the_ladder_of_decode_steps_rises_to_the_largest_batch() -> None:
    for most in (1, 3, 8, 17, 64, 100, 256):
        sizes = decode_ladder(most)
        assert list(sizes) == sorted(set(sizes)) and sizes[-1] == most and sizes[0] == 1


def test_the_ladder_of_short_steps_doubles() -> None:
    assert doubling_ladder(16, 100) == (16, 32, 64)
    assert doubling_ladder(16, 15) == ()


def test_steps_before_the_first_stay_within_the_engines_limits() -> None:
    limits = EngineLimits(max_running=8, max_step_tokens=2048, context_tokens=4100)
    layout = KvLayout(layers=2, kv_heads=1, head_dim=16, dtype="float32")
    plans = long_steps(layout, 1024, 4096, limits)
    assert [(plan.segments[0].start, plan.segments[0].count) for plan in plans] == [(0, 1025)]
    assert plans[0].segments[0].table.whole


@on_gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("captured", [True, False])
def test_a_ragged_batch_equals_generate(
    family: str, captured: bool, checkpoint: Callable[[str], Path], device: torch.device
) -> None:
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 128, 129, 200]
    prompts = [prompt_of(tokens, seed=tokens) for tokens in lengths]
    driver = Driver(fused(checkpoint(family), device), garbage=float("nan"), whole_blocks=True)
    if captured:
        assert driver.engine.capture() > 0
    requests = []
    for prompt in prompts:
        requests.append(driver.add(prompt, 24))
        driver.step()
    driver.run()
    assert [driver.output(request) for request in requests] == generate(checkpoint(family), prompts, 24)


def assert_nearly_likeliest(folder: Path, prompt: list[int], tokens: list[int], device: torch.device) -> None:
    """Every token is one that transformers, in bfloat16 too, finds almost as likely as its likeliest."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + tokens], device=device)).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits[torch.arange(len(tokens)), torch.tensor(tokens)]
    assert float((logits.amax(dim=-1) - chosen).max()) <= 0.05 * float(logits.std())


@on_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_a_token_differs_only_where_two_are_alike(
    family: str, checkpoint: Callable[[str], Path], device: torch.device
) -> None:
    """Rounding may decide between two tokens that the reference finds almost equally likely, and nothing else."""
    folder, prompts = checkpoint(family), [prompt_of(tokens, seed=tokens) for tokens in (16, 65, 130)]
    driver = Driver(fused(folder, device, "bfloat16"), whole_blocks=True)
    for prompt, tokens in zip(prompts, answers(driver, prompts, 16), strict=True):
        assert_nearly_likeliest(folder, prompt, tokens, device)


@on_gpu
@pytest.mark.parametrize("chunk_tokens", [4096, 2500, 1000])
def test_long_prompts_are_right_whichever_kernel_computes_them(
    chunk_tokens: int, tmp_path: Path, device: torch.device
) -> None:
    """Long chunks go to the library over a copy of the pages, filled up or behind a prefix cut to whole grains; short ones not."""
    folder = make_model("mini", tmp_path / "mini", family="llama", dtype="bfloat16")
    prompt = prompt_of(6144, seed=1)
    driver = Driver(fused(folder, device, "bfloat16"), whole_blocks=True, garbage=float("nan"))
    request = driver.add(prompt, 8)
    driver.run(chunk_tokens)
    assert_nearly_likeliest(folder, prompt, driver.output(request), device)
