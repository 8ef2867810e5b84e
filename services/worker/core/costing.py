"""What this worker's steps cost, learned from its own, and what that says of the work that waits here. Pure."""

from collections.abc import Collection, Iterable
from itertools import islice

from common.block_hash import BlockHash
from common.cost.step_cost import UNKNOWN_COST, StepCost
from common.cost.step_fit import StepFit, StepWork, prefill_work
from kvstore.index.block_pool import BlockPool
from services.worker.core.plan import Segment, StepPlan, StepResult
from services.worker.core.sequence import Sequence
from services.worker.core.waiting import WaitingPrompt

_LOOKED_AT = 32
"""Prompts of the queue that are matched against the cache for a report; the others are taken for cached by the same share."""


class Costing:
    """Owns the fit; reads the cache to know what of a waiting prompt need not be computed."""

    def __init__(self, fit: StepFit, pool: BlockPool, block_tokens: int, *, keeps: bool = True) -> None:
        """`keeps`: whether blocks of prompts stay for others when they are computed."""
        self._fit, self._pool, self._block_tokens, self._keeps = fit, pool, block_tokens, keeps

    @property
    def cost(self) -> StepCost | None:
        """As in reports."""
        return self._fit.cost

    def learn(self, plan: StepPlan | None, result: StepResult) -> None:
        """A step ended. One that waited for KV says how slow the KV was, not the engine."""
        if plan is not None and plan.number == result.number and not (plan.loads or plan.rings):
            self._fit.learn(step_work(plan.segments), result.compute_ms)

    def work_ms(self, started: Iterable[Sequence], queued: Iterable[WaitingPrompt]) -> float:
        """Predicted time to compute what is missing of all these prompts, one after the other.

        Cached is what the device holds now, or will when those that started are computed: queued prompts wait for that.
        What those that started have found elsewhere, such as KV in the host buffer, takes the link's time; what a KV store holds
        of a queued prompt is counted as work, since nobody knows yet whether it comes.
        """
        cost, coming, total_ms = self._fit.cost or UNKNOWN_COST, set[BlockHash](), 0.0
        for one in started:
            total_ms += cost.exec_ms(len(one.tokens), self._coming_tokens(one))
            coming.update(one.hashes[: one.known_tokens // self._block_tokens] if self._keeps else ())
        prompts = iter(queued)
        looked_at_tokens = cached_tokens = 0
        for prompt in islice(prompts, _LOOKED_AT):
            tokens, cached = _tokens(prompt), self._cached_tokens(prompt.names, coming)
            looked_at_tokens, cached_tokens = looked_at_tokens + tokens, cached_tokens + cached
            total_ms += cost.exec_ms(tokens, cached)
        share = cached_tokens / max(1, looked_at_tokens)
        return total_ms + sum(cost.exec_ms(_tokens(one), int(share * _tokens(one))) for one in prompts)

    def sequence_ms(self, sequence: Sequence) -> float:
        """Predicted time to compute what is missing of a sequence, alone. KV that is fetched takes the link's time, not ours."""
        return (self._fit.cost or UNKNOWN_COST).exec_ms(len(sequence.tokens), self._coming_tokens(sequence))

    def prompt_ms(self, prompt: WaitingPrompt) -> float:
        """The same of a prompt that waits; what is cached now need not be computed."""
        return (self._fit.cost or UNKNOWN_COST).exec_ms(_tokens(prompt), self._cached_tokens(prompt.names))

    def gauges(self) -> dict[str, float]:
        """As in reports: the median share by which the last predictions were off, once there were any."""
        errors = {"prefill": self._fit.prefill_misses.median, "decode": self._fit.decode_misses.median}
        known = {f"step_prediction_error{{kind={kind}}}": error for kind, error in errors.items() if error is not None}
        return {**known, "step_cost_samples": float(self._fit.cost.n_samples if self._fit.cost is not None else 0)}

    def _known_tokens(self, sequence: Sequence) -> int:
        return sequence.computed_tokens or self._cached_tokens(sequence.hashes)

    def _coming_tokens(self, sequence: Sequence) -> int:
        """Behind what is known, what was found elsewhere."""
        known, found = self._known_tokens(sequence), sequence.found
        if found is None or found.first_block * self._block_tokens > known:
            return known
        return max(known, found.end_block * self._block_tokens)

    def _cached_tokens(self, names: list[BlockHash], coming: Collection[BlockHash] = ()) -> int:
        blocks = self._pool.match(names)
        while blocks < len(names) and names[blocks] in coming:
            blocks += 1
        return blocks * self._block_tokens


def step_work(segments: Iterable[Segment]) -> StepWork:
    """What a step computes. A segment of one token is computed as a decoding row, whoever's token it is."""
    new_tokens = rows = kv_tokens = 0
    pairs = 0.0
    for segment in segments:
        if segment.count == 1:
            rows += 1
            kv_tokens += segment.start + 1
        else:
            new_tokens += segment.count
            pairs += prefill_work(segment.start, segment.count).pairs
    return StepWork(new_tokens, pairs, rows, kv_tokens)


def _tokens(prompt: WaitingPrompt) -> int:
    """Tokens of the answer that another worker has drawn already are computed like the prompt's own."""
    return len(prompt.message.prompt) + len(prompt.message.emitted)
