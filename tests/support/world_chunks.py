"""The system that gives workers of a pure world their memory: chunks that are lent to steps or to nobody, and come back."""

import random

from common.ids import Owner
from common.policy.elastic import ArenaTerms
from services.worker.core.actions import LendChunks, TakeBackChunks
from services.worker.core.elastic import ACTIVATIONS
from services.worker.core.plan import StepPlan
from tests.support.world_process import CHUNK_PAGES, Process


class Chunks:
    """Owns how many have moved. `arena`: what steps need. `flaky_maps`: part of the moves that the system does not bear."""

    def __init__(self, rng: random.Random, arena: ArenaTerms | None, flaky_maps: float) -> None:
        self._rng, self._arena, self._flaky_maps = rng, arena, flaky_maps
        self.moved = {"lent": 0, "returned": 0, "refused": 0}

    def move(self, process: Process, order: LendChunks | TakeBackChunks) -> str:
        """Why not, or "". Real mappings may fail, but for those that a worker starts with."""
        comes_later = isinstance(order, TakeBackChunks) and order.owner != ACTIVATIONS
        if process.alive and process.arena and not comes_later and self._rng.random() < self._flaky_maps:
            self.moved["refused"] += len(order.chunks)
            return "no mapping left"
        if isinstance(order, LendChunks):
            self._lend(process, order.chunks, order.to)
        else:
            self._take_back(process, order.chunks, order.owner)
        return ""

    def _lend(self, process: Process, chunks: tuple[int, ...], to: Owner) -> None:
        self.moved["lent"] += len(chunks)
        for chunk in chunks:
            process.memory.lend(_pages_of(chunk))
        if to == ACTIVATIONS:
            process.arena += chunks

    def _take_back(self, process: Process, chunks: tuple[int, ...], owner: Owner) -> None:
        if owner != ACTIVATIONS:
            process.refills.append(chunks)
            return
        assert process.arena[-len(chunks) :] == list(chunks), "the arena shrinks at its end"
        self._home(process, chunks)
        del process.arena[-len(chunks) :]
        if process.step is not None:
            self.require_scratch(process, process.step)

    def _home(self, process: Process, chunks: tuple[int, ...]) -> None:
        self.moved["returned"] += len(chunks)
        for chunk in chunks:
            process.memory.take_back(_pages_of(chunk))

    def refill(self, process: Process, problem: str) -> tuple[int, ...]:
        """The system gives back what it was asked for first, unless there is a problem."""
        chunks = process.refills.popleft()
        if problem:
            self.moved["refused"] += len(chunks)
        else:
            self._home(process, chunks)
        return chunks

    def require_scratch(self, process: Process, plan: StepPlan) -> None:
        """The arena holds what the step needs: when it is submitted, and as long as it is computed."""
        if self._arena is not None:
            needed = self._arena.step.needs_bytes(plan.n_tokens, max(one.start + one.count for one in plan.segments))
            assert needed <= len(process.arena) * self._arena.chunk_bytes, f"{plan} without scratch"


def _pages_of(chunk: int) -> range:
    return range(chunk * CHUNK_PAGES, (chunk + 1) * CHUNK_PAGES)
