"""An engine without tensors: draws tokens by a rule that a test can predict. Pure; used to test cores."""

from collections.abc import Callable, Mapping

from common.ids import RequestId
from common.messages.requests import TokenLogprob
from services.worker.core.plan import Sampled, Segment, StepPlan, StepResult


def next_token(tokens: list[int]) -> int:
    """What the fake engine draws after `tokens`: depends on all of them, and on nothing else."""
    return (sum((i + 1) * t for i, t in enumerate(tokens)) * 31 + len(tokens)) % 997 + 3


def answer(prompt: list[int], n_tokens: int) -> list[int]:
    """The right answer to a prompt."""
    tokens = list(prompt)
    for _ in range(n_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def computed_tokens(segment: Segment, drawn: Mapping[RequestId, int]) -> list[int]:
    """All tokens up to the end of a segment; `drawn`: what the step before drew, by request."""
    if segment.pending:
        return [*segment.tokens[: segment.start], drawn[segment.request]]
    return segment.tokens[: segment.start + segment.count]


class FakeEngine:
    """Computes a plan at once. Checks what a real engine relies on. Remembers what its last step drew."""

    def __init__(self, *, layers: int, block_tokens: int) -> None:
        self.layers, self.block_tokens = layers, block_tokens
        self.drawn: dict[RequestId, int] = {}

    def step(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> StepResult:
        seen_prefill = False
        for segment in plan.segments:
            assert segment.count >= 1
            assert segment.table.n_blocks * self.block_tokens >= segment.start + segment.count
            assert segment.sample == (segment.pending or segment.start + segment.count == len(segment.tokens))
            assert not segment.pending or segment.count == 1
            assert not (seen_prefill and segment.count == 1 and segment.start >= segment.prompt_tokens)
            seen_prefill = seen_prefill or segment.count > 1
        if on_layer is not None and any(s.streamed for s in plan.segments):
            for layer in range(self.layers):
                on_layer(layer)
        drawn = {s.request: next_token(computed_tokens(s, self.drawn)) for s in plan.segments if s.sample}
        self.drawn = drawn
        sampled = tuple(Sampled(request, token, TokenLogprob(token, -1.0)) for request, token in drawn.items())
        return StepResult(plan.number, sampled, 1.0)
