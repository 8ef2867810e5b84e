"""Random K and V in one large pool, and the clock for kernels over them, as a CUDA graph replays them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.kv_source import PagedKv, ViewKv

HEAD_DIM, BLOCK_TOKENS, HEADS = 128, 16, 32
DTYPE = torch.bfloat16
_COLD_BYTES = 300 * 2**20
_MEASURED_MS = 12.0


@dataclass(frozen=True)
class Pool:
    """One flat tensor of normal numbers, read as pages, as views, or as contiguous tensors."""

    flat: Tensor

    @classmethod
    def of(cls, n_bytes: int) -> "Pool":
        """On the current device."""
        flat = torch.empty(n_bytes // 2, dtype=DTYPE, device="cuda")
        for part in flat.split(2**28):
            part.normal_()
        return cls(flat)

    def paged(self, sequences: int, length: int, kv_heads: int, sets: int) -> list[PagedKv]:
        """`sets` batches whose pages are disjoint as long as the pool suffices, in random order."""
        page = 2 * BLOCK_TOKENS * kv_heads * HEAD_DIM
        n_pages = self.flat.numel() // page
        pages = self.flat[: n_pages * page].view(n_pages, BLOCK_TOKENS, 2, kv_heads, HEAD_DIM)
        blocks = -(-length // BLOCK_TOKENS)
        order = torch.randperm(n_pages, device="cuda")[: sets * sequences * blocks]
        tables = order.to(torch.int32).view(sets, sequences, blocks)
        return [PagedKv(pages, tables[i].contiguous()) for i in range(sets)]

    def contiguous(self, sequences: int, length: int, kv_heads: int, sets: int) -> list[tuple[Tensor, Tensor]]:
        """`sets` pairs of K and V [sequences, length, kv_heads, head_dim]."""
        one = sequences * length * kv_heads * HEAD_DIM
        shape = (sequences, length, kv_heads, HEAD_DIM)
        parts = [self.flat[2 * i * one : 2 * (i + 1) * one] for i in range(sets)]
        return [(part[:one].view(shape), part[one:].view(shape)) for part in parts]

    def views(self, sequences: int, length: int, kv_heads: int, sets: int) -> list[ViewKv]:
        """The same memory as `contiguous`, as a vTensor's views."""
        row = kv_heads * HEAD_DIM
        starts = torch.arange(sequences, dtype=torch.int64, device="cuda") * (length * row)
        return [
            ViewKv(keys.view(-1), values.view(-1), starts, kv_heads, HEAD_DIM, row)
            for keys, values in self.contiguous(sequences, length, kv_heads, sets)
        ]


def cold_sets(n_bytes: int) -> int:
    """Input sets that together are several times as large as the cache."""
    return max(1, min(48, -(-_COLD_BYTES // n_bytes)))


def graph_s(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of one call: all are captured in one graph, which is replayed; the host's share is left out."""
    calls[0]()
    calls[-1]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return _median_s(graph.replay) / len(calls)


def eager_s(call: Callable[[], object]) -> float:
    """Seconds of one call that is long enough to hide its launch."""
    call()
    return _median_s(call)


def _median_s(call: Callable[[], object]) -> float:
    def once_ms(repeats: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / repeats

    call()
    first_ms = max(once_ms(1), 1e-3)
    repeats = max(1, min(50, int(_MEASURED_MS / 3 / first_ms)))
    return sorted(once_ms(repeats) for _ in range(3))[1] / 1e3
