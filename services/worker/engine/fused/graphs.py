"""Whole steps as CUDA graphs: one for each size of a ladder, captured once, replayed for every step that fits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol  # Any: torch has no public name for a pool's handle

import torch

_SMALL = (1, 2, 4, 8)
_STEP_ROWS = 8
_LARGE_FROM, _LARGE_STEP_ROWS = 64, 32


class Replayable(Protocol):
    """What stands for a whole step."""

    def replay(self) -> None:
        """Queue the step."""
        ...


def decode_ladder(max_rows: int) -> tuple[int, ...]:
    """Batch sizes of decode steps: dense where a step is short, with `max_rows` itself as the last.

    A batch between two of them computes rows for nobody, at most as many as its own, which costs attention nothing.
    """
    sizes = [size for size in _SMALL if size < max_rows]
    sizes += range(2 * _STEP_ROWS, min(_LARGE_FROM, max_rows), _STEP_ROWS)
    sizes += range(_LARGE_FROM, max_rows, _LARGE_STEP_ROWS)
    return (*sizes, max_rows)


def doubling_ladder(least: int, most: int) -> tuple[int, ...]:
    """least, twice that and so on, up to `most`."""
    sizes = []
    while least <= most:
        sizes.append(least)
        least *= 2
    return tuple(sizes)


@dataclass(frozen=True, slots=True)
class _Called:
    step: Callable[[int], None]
    size: int

    def replay(self) -> None:
        self.step(self.size)


class StepGraphs:
    """Owns the graphs of one kind of step. Used by the engine's thread, on its stream, like everything it captures."""

    def __init__(self, sizes: Sequence[int], step: Callable[[int], None]) -> None:
        """`step(size)` queues a step of that size whose inputs and outputs lie at addresses that stay."""
        self._sizes, self._step = tuple(sizes), step
        self._graphs: dict[int, Replayable] = {}

    def capture(self, pool: Any) -> int:
        """Capture all, the largest first: the smaller ones fit into its memory. Takes some tenths of a second each.

        `pool` is torch's, and may be shared with other graphs, as no two of them run at once; None: there are no graphs
        on this device, and the step itself stands for them. Returns how many.
        """
        for size in reversed(self._sizes):
            if pool is None:
                self._graphs[size] = _Called(self._step, size)
                continue
            self._step(size)  # compiles kernels and makes workspaces, neither of which a capture may do
            torch.cuda.current_stream().synchronize()
            graph = torch.cuda.CUDAGraph()
            # Threads that move KV may call CUDA meanwhile; only this one's calls must not synchronise.
            with torch.cuda.graph(
                graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
            ):
                self._step(size)
            self._graphs[size] = graph
        return len(self._sizes)

    def size_for(self, n: int) -> int | None:
        """The size that a step of size `n` runs as; None: nothing of that size is captured."""
        return next((size for size in self._sizes if size >= n and size in self._graphs), None)

    def replay(self, size: int) -> None:
        """Queue the captured step of exactly that size."""
        self._graphs[size].replay()
