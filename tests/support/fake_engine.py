"""An engine without tensors: draws tokens by a rule that a test can predict. Pure; used to test cores."""

from collections.abc import Callable

from common.messages.requests import TokenLogprob
from services.worker.core.plan import Sampled, StepPlan, StepResult


def next_token(tokens: list[int]) -> int:
    """What the fake engine draws after `tokens`: depends on all of them, and on nothing else."""
    return (sum((i + 1) * t for i, t in enumerate(tokens)) * 31 + len(tokens)) % 997 + 3


def answer(prompt: list[int], n_tokens: int) -> list[int]:
    """The right answer to a prompt."""
    tokens = list(prompt)
    for _ in range(n_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeEngine:
    """Computes a plan at once. Checks what a real engine relies on."""

    def __init__(self, *, layers: int, block_tokens: int) -> None:
        self.layers, self.block_tokens = layers, block_tokens

    def step(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> StepResult:
        seen_prefill = False
        for segment in plan.segments:
            assert segment.count >= 1
            assert segment.table.n_blocks * self.block_tokens >= segment.start + segment.count
            assert segment.sample == (segment.start + segment.count == len(segment.tokens))
            assert not (seen_prefill and segment.count == 1 and segment.start >= segment.prompt_tokens)
            seen_prefill = seen_prefill or segment.count > 1
        if on_layer is not None and any(s.streamed for s in plan.segments):
            for layer in range(self.layers):
                on_layer(layer)
        sampled = tuple(
            Sampled(s.request, token := next_token(s.tokens), TokenLogprob(token, -1.0))
            for s in plan.segments
            if s.sample
        )
        return StepResult(plan.number, sampled, 1.0)
