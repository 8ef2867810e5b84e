"""What mapping costs a decode batch whose sequences grow, end and are replaced, on a virtual clock with a GPU's costs.

The views, their thread and their planning are the ones that serve; only the memory is counted, and each call of the back
end moves the clock of the thread that makes it: the step's own, or the one that maps beside it.
"""

import random
import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from statistics import mean

import numpy as np
from numpy.typing import NDArray

from common.kv_layout import KvLayout
from kvstore.memory.chunks import ChunkPool
from kvstore.memory.fake import MEASURED_GPU, FakeBackend
from kvstore.memory.page_pool import PagePool
from kvstore.memory.sequence_views import SequenceViews

LAYOUT = KvLayout(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16", block_tokens=512)
STEP_MS = 20.0
_PROMPT_TOKENS, _OUTPUT_TOKENS = (512, 4096), (128, 1024)
_CONTEXT_BLOCKS = LAYOUT.blocks_for(_PROMPT_TOKENS[1] + _OUTPUT_TOKENS[1])
_SPARE_SLOTS, _KEPT = 8, 8
_WAIT_S = 60.0


@dataclass(frozen=True)
class Way:
    """How a batch has its views mapped."""

    name: str
    lead_tokens: int | None
    """Growth is asked for so many tokens before, admissions one step before; None: nothing is mapped ahead."""
    continued: float
    """Share of new sequences that continue an ended one: they begin with its pages."""


@dataclass(frozen=True)
class StepCosts:
    """Of one way, per step; shares are of a step's time."""

    way: str
    batch: int
    mapping_share: float
    exposed_share: float
    worst_exposed_share: float
    hidden: float
    """Of the mapping time, what runs beside steps."""
    ready: float
    """Of the blocks of new sequences, those that were there when it began: mapped ahead, or shown before by an ended one."""


@dataclass
class _Sequence:
    owner: Hashable
    blocks: list[int]
    tokens: int
    end_tokens: int


@dataclass
class Batch:
    """Owns the blocks of a pool and the sequences that run."""

    size: int
    continued: float
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    running: list[_Sequence] = field(default_factory=list)
    ended: list[_Sequence] = field(default_factory=list)
    serial: int = 0

    def __post_init__(self) -> None:
        self.free = list(range((self.size + _KEPT + 1) * (_CONTEXT_BLOCKS + 1)))
        self.running = [self.admit() for _ in range(self.size)]
        for sequence in self.running:  # as if they had run for a while
            self.grow(sequence, self.rng.randrange(sequence.end_tokens - sequence.tokens))

    def admit(self) -> _Sequence:
        self.serial += 1
        prompt, output = self.rng.randint(*_PROMPT_TOKENS), self.rng.randint(*_OUTPUT_TOKENS)
        blocks: list[int] = []
        if self.ended and self.rng.random() < self.continued:
            before = self.ended.pop(self.rng.randrange(len(self.ended)))
            whole = min(before.tokens, _PROMPT_TOKENS[1] - 64) // LAYOUT.block_tokens
            blocks, unused = before.blocks[:whole], before.blocks[whole:]
            self.free += unused
            prompt = min(_PROMPT_TOKENS[1], whole * LAYOUT.block_tokens + self.rng.randint(64, 1024))
        made = _Sequence(f"s{self.serial}", list(blocks), 0, prompt + output)
        self.grow(made, prompt)
        return made

    def grow(self, sequence: _Sequence, tokens: int) -> None:
        sequence.tokens += tokens
        while len(sequence.blocks) < LAYOUT.blocks_for(sequence.tokens):
            sequence.blocks.append(self.free.pop())

    def end(self, sequence: _Sequence) -> None:
        self.running.remove(sequence)
        self.ended.append(sequence)
        if len(self.ended) > _KEPT:
            self.free += self.ended.pop(0).blocks


def table(sequence: _Sequence) -> NDArray[np.int32]:
    """Pages [layers, blocks]: those of a block lie one behind the other."""
    return (
        np.array(sequence.blocks, np.int32)[None, :] * LAYOUT.layers + np.arange(LAYOUT.layers, dtype=np.int32)[:, None]
    )


class _Clocks:
    """What mapping took of the step's thread and of the other one."""

    def __init__(self) -> None:
        self._own = threading.get_ident()
        self.step_ms = self.beside_ms = 0.0

    def advance(self, by_ms: float) -> None:
        if threading.get_ident() == self._own:
            self.step_ms += by_ms
        else:
            self.beside_ms += by_ms


def measure(way: Way, size: int, n_steps: int) -> StepCosts:
    """Run one batch. What the thread beside a step does not finish in the step's time counts as exposed."""
    clocks, batch = _Clocks(), Batch(size, way.continued)
    n_bytes = (
        len(batch.free) * LAYOUT.page_bytes * LAYOUT.layers + size * _CONTEXT_BLOCKS * LAYOUT.layers * LAYOUT.page_bytes
    )
    backend = FakeBackend(n_bytes, 2 * 2**20, costs=MEASURED_GPU, advance_ms=clocks.advance)
    pages = PagePool(ChunkPool(backend, n_bytes, LAYOUT.page_bytes), LAYOUT)
    pages.grow(n_bytes // LAYOUT.page_bytes)
    views = SequenceViews(pages, n_slots=size + _SPARE_SLOTS, context_blocks=_CONTEXT_BLOCKS, lock=threading.Lock())
    views.begin_step([sequence.owner for sequence in batch.running])
    for sequence in batch.running:
        views.show(sequence.owner, table(sequence))
    beside, exposed, new_blocks, new_hits = list[float](), list[float](), 0, 0
    for _ in range(n_steps):
        clocks.step_ms = clocks.beside_ms = 0.0
        ready = [sequence for sequence in batch.running if sequence.tokens >= sequence.end_tokens]
        admitted = [batch.admit() for _ in ready]
        if way.lead_tokens is not None:  # the step before runs meanwhile
            _ask_ahead(views, batch, admitted, way.lead_tokens)
        views.wait_ahead(_WAIT_S)
        beside.append(clocks.beside_ms)
        views.end_step()
        for sequence in ready:
            batch.end(sequence)
        views.begin_step([sequence.owner for sequence in [*batch.running, *admitted]])
        before = views.stats()
        for sequence in admitted:
            views.show(sequence.owner, table(sequence))
        after = views.stats()
        new_blocks += sum(len(sequence.blocks) for sequence in admitted)
        new_hits += after.hit_blocks - before.hit_blocks
        for sequence in batch.running:
            batch.grow(sequence, 1)
            views.show(sequence.owner, table(sequence))
        batch.running += admitted
        exposed.append(clocks.step_ms + max(0.0, beside[-1] - STEP_MS))
    views.close()
    total_ms = mean(beside) + mean(exposed)
    return StepCosts(
        way.name,
        size,
        total_ms / STEP_MS,
        mean(exposed) / STEP_MS,
        max(exposed) / STEP_MS,
        1 - mean(exposed) / total_ms if total_ms else 0.0,
        new_hits / max(1, new_blocks),
    )


def _ask_ahead(views: SequenceViews, batch: Batch, admitted: list[_Sequence], lead_tokens: int) -> None:
    for sequence in batch.running:
        room_tokens = len(sequence.blocks) * LAYOUT.block_tokens - sequence.tokens
        if room_tokens < lead_tokens and len(sequence.blocks) < _CONTEXT_BLOCKS:
            sequence.blocks.append(batch.free.pop())
            views.ahead(sequence.owner, table(sequence))
    for sequence in admitted:
        views.ahead(sequence.owner, table(sequence))
