"""The engine goes on with a token that it has only just drawn, before anybody has heard of it."""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any  # what an engine launches is its own affair

import pytest
import torch

from common.block_hash import BlockHash
from common.ids import RequestId
from common.messages.requests import Sampling
from common.policy.batching import DecodeFirst
from common.policy.eviction import Lru
from kvstore.index.block_pool import BlockPool
from kvstore.index.ledger import Ledger
from services.worker.core.outputs import finish_of
from services.worker.core.prefix import Keep, PrefixReuse
from services.worker.core.scheduler import Scheduler
from services.worker.core.sequence import NewPrompt
from services.worker.engine.make import EngineLimits, make_engine
from services.worker.model.load import LoadedModel, load_model
from services.worker.model.packing import LinearPath
from tests.services.worker.engine.test_parity import generate, prompt_of

PAGES = 26
LENGTHS, N_TOKENS = (1, 15, 16, 17, 40), 40


def answers(model: LoadedModel, prompts: list[list[int]], sampling: Sampling, *, ahead: bool) -> list[list[int]]:
    """Pages are too few for all at once; a launch is collected after the next one, if there is a next one yet."""
    layout = model.layout
    shape = (PAGES, layout.block_tokens, 2, layout.kv_heads, layout.head_dim)
    pages = torch.full(shape, float("nan"), dtype=model.dtype, device=model.device)
    limits = EngineLimits(max_running=8, max_step_tokens=32, context_tokens=512)
    reuse = PrefixReuse(BlockPool(Ledger(PAGES), layout.layers, Lru()), Keep.NOTHING, layout.block_tokens)
    scheduler = Scheduler(reuse, layout, DecodeFirst(32, layout.block_tokens), max_running=8, context_tokens=512)
    engine, launched, found = make_engine(model, pages, limits), deque[Any](), dict[str, list[int]]()
    engine.capture()
    for number, tokens in enumerate(prompts):
        request = RequestId(str(number))
        scheduler.submit(NewPrompt(request=request, tokens=tuple(tokens), sampling=sampling, root=BlockHash(bytes(16))))
    while not scheduler.idle:
        for plan in (scheduler.plan(), scheduler.plan_ahead() if ahead else None):
            if plan is not None:
                launched.append(engine.launch(plan, None, None))
        for new in scheduler.complete(engine.collect(launched.popleft())):
            if finish_of(new.sequence) is not None:
                found[new.sequence.request] = new.sequence.tokens[new.sequence.prompt_tokens :]
                scheduler.drop(new.sequence.request)
    assert scheduler.preemptions_total > 0
    assert (scheduler.flight.ahead_total > 0) is ahead
    return [found[str(number)] for number in range(len(prompts))]


def test_greedy_answers_planned_ahead_equal_generate(checkpoint: Callable[[str], Path]) -> None:
    prompts = [prompt_of(tokens, seed=tokens) for tokens in LENGTHS]
    model = load_model(checkpoint("llama"))
    found = answers(model, prompts, Sampling(max_tokens=N_TOKENS), ahead=True)
    assert found == generate(checkpoint("llama"), prompts, N_TOKENS)


@pytest.mark.long
@pytest.mark.parametrize("stop", [False, True])
def test_drawn_answers_are_the_same_planned_ahead_or_not(stop: bool, checkpoint: Callable[[str], Path]) -> None:
    prompts = [prompt_of(tokens, seed=tokens) for tokens in LENGTHS]
    model = load_model(checkpoint("llama"))
    sampling = Sampling(max_tokens=N_TOKENS, temperature=0.9, top_p=0.95, seed=7)
    right = answers(model, prompts, sampling, ahead=False)
    if stop:
        ids = tuple(tokens[33] for tokens in right)
        sampling = Sampling(max_tokens=N_TOKENS, temperature=0.9, top_p=0.95, seed=7, stop_token_ids=ids)
        right = [tokens[: min(tokens.index(one) for one in ids if one in tokens) + 1] for tokens in right]
    assert answers(model, prompts, sampling, ahead=True) == right


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.95, "seed": 7}])
def test_answers_planned_ahead_on_a_gpu_are_those_of_the_processor(
    sampling: dict[str, float], checkpoint: Callable[[str], Path], device: torch.device
) -> None:
    prompts = [prompt_of(tokens, seed=tokens) for tokens in LENGTHS]
    how = Sampling(max_tokens=N_TOKENS, **sampling)  # type: ignore[arg-type]  # a test's keywords
    right = answers(load_model(checkpoint("llama")), prompts, how, ahead=False)
    model = load_model(checkpoint("llama"), "float32", str(device), path=LinearPath.FUSED)
    assert answers(model, prompts, how, ahead=True) == right
    assert answers(model, prompts, how, ahead=False) == right
