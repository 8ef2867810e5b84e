"""Which steps a profile measures: prompts of several lengths behind several cached ones, batches at several contexts. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from common.cost.step_fit import StepWork, prefill_work

_SHORTEST_TOKENS = 16
_FIRST_CACHED_TOKENS, _FIRST_CONTEXT_TOKENS = 256, 64


@dataclass(frozen=True, slots=True)
class GridPoint:
    """One step: `count` tokens of each of `rows` sequences, behind `context` tokens of each whose KV is there."""

    rows: int
    count: int
    context: int

    @property
    def decodes(self) -> bool:
        """One token each, drawn; otherwise a chunk of one prompt."""
        return self.count == 1

    @property
    def n_tokens(self) -> int:
        """Of KV that it needs room for."""
        return self.rows * (self.context + self.count)

    @property
    def work(self) -> StepWork:
        """In the terms of the cost model."""
        if self.decodes:
            return StepWork(rows=self.rows, kv_tokens=self.n_tokens)
        return prefill_work(self.context, self.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class GridLimits:
    """What a worker with these settings could ever compute in a step."""

    context_tokens: int
    pool_tokens: int
    """Tokens that the pages hold."""
    max_step_tokens: int
    max_running: int

    def admits(self, point: GridPoint, block_tokens: int) -> bool:
        """Whether a worker could have such a step; every sequence takes whole blocks."""
        sequence_tokens = point.context + point.count
        room_tokens = point.rows * -(-sequence_tokens // block_tokens) * block_tokens
        return sequence_tokens <= self.context_tokens and room_tokens <= self.pool_tokens


def choose_grid(limits: GridLimits, block_tokens: int, *, quick: bool) -> list[GridPoint]:
    """All points within the limits; may be few in a small pool. `quick`: about a third of them."""
    step = 4 if quick else 2
    deepest = min(limits.context_tokens, limits.pool_tokens)
    counts = [*_powers(_SHORTEST_TOKENS, step, limits.max_step_tokens - 1), limits.max_step_tokens]
    cached = [0, *_powers(_FIRST_CACHED_TOKENS, step**2, deepest)]
    batches = [*_powers(1, step, limits.max_running - 1), limits.max_running]
    contexts = list(_powers(_FIRST_CONTEXT_TOKENS, step**2, deepest))
    points = [
        *(GridPoint(1, count, start) for start in cached for count in counts if count > 1),
        *(GridPoint(batch, 1, context - 1) for context in contexts for batch in batches),
    ]
    return [point for point in points if limits.admits(point, block_tokens)]


def _powers(first: int, factor: int, last: int) -> Iterator[int]:
    value = first
    while value <= last:
        yield value
        value *= factor
