"""Captured steps, short and decoding, planned ahead by the real scheduler, give transformers' tokens.

Without a GPU a graph is the step itself, called: sizes, padding and the choice between the ways are the same.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
from tests.services.worker.engine.test_fused import fused
from tests.services.worker.engine.test_parity import generate, prompt_of

# Of the interpreter, in rows that are computed for nobody and hold whatever the memory held.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in multiply")

LIMITS = EngineLimits(max_running=4, max_step_tokens=32, context_tokens=256)
ANSWER_TOKENS = 7


@dataclass(frozen=True)
class Asked:
    prompt: list[int]
    sampling: Sampling
    streamed: bool


class Rig:
    """Scheduler and engine with up to two steps on their way."""

    def __init__(self, folder: Path, device: torch.device, blocks: int) -> None:
        model = fused(folder, device)
        layout = model.layout
        shape = (blocks * layout.layers, layout.block_tokens, 2, layout.kv_heads, layout.head_dim)
        self.engine = make_engine(model, torch.full(shape, float("nan"), device=device), LIMITS)
        assert self.engine.capture() > 0
        reuse = PrefixReuse(BlockPool(Ledger(shape[0]), layout.layers, Lru()), Keep.ALL, layout.block_tokens)
        policy = DecodeFirst(LIMITS.max_step_tokens, layout.block_tokens)
        self.scheduler = Scheduler(
            reuse, layout, policy, max_running=LIMITS.max_running, context_tokens=LIMITS.context_tokens
        )
        self.layers: list[int] = []

    def answers(self, asked: list[Asked], rng: random.Random) -> list[list[int]]:
        """All of them, arriving while others run."""
        waiting, launched, found = list(enumerate(asked)), deque(), {}
        while waiting or not self.scheduler.idle:
            if waiting and rng.random() < 0.6:
                number, one = waiting.pop(0)
                self.scheduler.submit(
                    NewPrompt(
                        request=RequestId(str(number)),
                        tokens=tuple(one.prompt),
                        sampling=one.sampling,
                        root=BlockHash(bytes(16)),
                        streamed=one.streamed,
                    )
                )
            for plan in (self.scheduler.plan(), self.scheduler.plan_ahead()):
                if plan is not None:
                    launched.append(self.engine.launch(plan, self.layers.append, None))
            if launched:
                for new in self.scheduler.complete(self.engine.collect(launched.popleft())):
                    if finish_of(new.sequence) is not None:
                        found[new.sequence.request] = new.sequence.tokens[new.sequence.prompt_tokens :]
                        self.scheduler.drop(new.sequence.request)
        return [found[RequestId(str(number))] for number in range(len(asked))]


def drawn_work(folder: Path, rng: random.Random, count: int) -> tuple[list[Asked], list[list[int]]]:
    """Requests of every kind that changes how a step is queued, and their right answers."""
    shared = prompt_of(32, seed=9)
    lengths = (1, 15, 16, 17, 20)
    prompts = [(shared if rng.random() < 0.4 else []) + prompt_of(rng.choice(lengths), seed=n) for n in range(count)]
    asked, expected = [], []
    for prompt, right in zip(prompts, generate(folder, prompts, ANSWER_TOKENS), strict=True):
        kind = rng.choice(["plain", "plain", "stop", "host", "streamed", "short"])
        most = 1 + rng.randrange(ANSWER_TOKENS) if kind == "short" else ANSWER_TOKENS
        stop = (right[rng.randrange(ANSWER_TOKENS)],) if kind == "stop" else ()
        answer = right[:most]
        expected.append(answer[: answer.index(stop[0]) + 1] if stop else answer)
        sampling = Sampling(max_tokens=most, stop_token_ids=stop, logprobs=0 if kind == "host" else None)
        asked.append(Asked(prompt, sampling, kind == "streamed"))
    return asked, expected


@pytest.mark.system  # ten seconds each in the interpreter
@pytest.mark.parametrize(("seed", "blocks"), [(1, 11), (4, 8)])
def test_whatever_meets_in_a_step_the_tokens_are_transformers_tokens(
    seed: int, blocks: int, checkpoint: Callable[[str], Path], device: torch.device
) -> None:
    rng = random.Random(seed)
    asked, expected = drawn_work(checkpoint("qwen2"), rng, 5)
    rig = Rig(checkpoint("qwen2"), device, blocks)
    assert rig.answers(asked, rng) == expected
    if any(one.streamed for one in asked):
        assert rig.layers


@pytest.mark.long
def test_a_short_step_and_decode_steps_of_two_sequences(
    checkpoint: Callable[[str], Path], device: torch.device
) -> None:
    prompts = [prompt_of(3, seed=1), prompt_of(5, seed=2)]
    asked = [Asked(prompt, Sampling(max_tokens=3), streamed=False) for prompt in prompts]
    rig = Rig(checkpoint("qwen2"), device, 8)
    assert rig.answers(asked, random.Random(0)) == generate(checkpoint("qwen2"), prompts, 3)


@pytest.mark.long
def test_a_top_k_beyond_32_bits_keeps_every_token(checkpoint: Callable[[str], Path], device: torch.device) -> None:
    prompt = prompt_of(3, seed=1)
    sampling = Sampling(max_tokens=1, temperature=1.0, top_k=3_000_000_000, top_p=0.0001, seed=1)
    rig = Rig(checkpoint("qwen2"), device, 8)
    found = rig.answers([Asked(prompt, sampling, streamed=False)], random.Random(0))
    assert found == generate(checkpoint("qwen2"), [prompt], 1)
