"""Decode steps as CUDA graphs: one per batch size of a ladder, captured once, replayed for every step that fits."""

from collections.abc import Callable
from typing import Protocol

import torch

_SMALL = (1, 2, 4, 8)
_STEP_ROWS = 8
_LARGE_FROM, _LARGE_STEP_ROWS = 64, 32


class Replayable(Protocol):
    """What stands for a whole step."""

    def replay(self) -> None:
        """Queue the step."""
        ...


def ladder(max_rows: int) -> tuple[int, ...]:
    """Batch sizes to capture: dense where a step is short, with `max_rows` itself as the last.

    A batch between two of them computes rows for nobody, at most a third of it, which costs attention nothing.
    """
    sizes = [size for size in _SMALL if size < max_rows]
    sizes += range(2 * _STEP_ROWS, min(_LARGE_FROM, max_rows), _STEP_ROWS)
    sizes += range(_LARGE_FROM, max_rows, _LARGE_STEP_ROWS)
    return (*sizes, max_rows)


class DecodeGraphs:
    """Owns the graphs and their memory. Used by the engine's thread, on its stream, like everything it captures."""

    def __init__(self, max_rows: int, step: Callable[[int], None]) -> None:
        """`step(rows)` queues a decode step of that many rows whose inputs and outputs lie at addresses that stay."""
        self._sizes, self._step = ladder(max_rows), step
        self._graphs: dict[int, Replayable] = {}

    @property
    def sizes(self) -> tuple[int, ...]:
        """The ladder, rising."""
        return self._sizes

    def capture(self) -> None:
        """Capture all, the largest first: the smaller ones fit into its memory. Takes some tenths of a second each."""
        pool = torch.cuda.graph_pool_handle()
        for rows in reversed(self._sizes):
            self._step(rows)  # compiles kernels and makes workspaces, neither of which a capture may do
            torch.cuda.current_stream().synchronize()
            graph = torch.cuda.CUDAGraph()
            # Threads that move KV may call CUDA meanwhile; only this one's calls must not synchronise.
            with torch.cuda.graph(
                graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
            ):
                self._step(rows)
            self._graphs[rows] = graph

    def rows_for(self, n_rows: int) -> int | None:
        """The size that a batch of `n_rows` runs as; None: nothing of that size is captured."""
        return next((size for size in self._sizes if size >= n_rows and size in self._graphs), None)

    def replay(self, rows: int) -> None:
        """Queue the captured step of exactly that size."""
        self._graphs[rows].replay()
