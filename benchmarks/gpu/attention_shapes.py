"""Which tiles, warps and stages the attention kernels run best with; `decode_shape` and `prefill_shape` take the winners."""

from collections.abc import Callable, Iterable
from dataclasses import fields

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.gpu._attention_inputs import DTYPE, HEAD_DIM, HEADS, Pool, cold_sets, graph_s
from benchmarks.gpu.limits import copy_bytes_per_s, matmul_flop_per_s
from benchmarks.gpu.table import Row, run_and_write
from kernels.kv_source import PagedKv, ViewKv
from kernels.paged_decode import DecodeShape, paged_decode
from kernels.paged_prefill import PrefillShape, paged_prefill

_POOL_BYTES = 4 * 2**30
_KV_HEADS = 8
_SCALING = HEAD_DIM**-0.5
AnyShape = DecodeShape | PrefillShape
_SHOWN = 5
_COMPILED = ((32, 4, 4), (64, 4, 3), (64, 4, 4), (64, 8, 3), (128, 4, 3), (128, 8, 3))
DECODE_SHAPES = [DecodeShape(*cut, programs_per_processor=n) for cut in _COMPILED for n in (1, 2, 3)]
DECODES = [(1, 512), (1, 4096), (1, 32768), (8, 512), (8, 4096), (32, 512), (32, 4096), (128, 512), (128, 4096)]
PREFILL_SHAPES = [
    PrefillShape(rows, tile, warps, stages)
    for rows, tile, warps, stages in (
        (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3),
    )
]  # fmt: skip
PREFILLS = [(512, 0), (2048, 0), (16384, 0), (512, 8192)]


def run(quick: bool) -> list[Row]:
    """The fastest shapes of each case; ratio as in benchmarks/gpu/attention.py."""
    pool = Pool.of(_POOL_BYTES)
    rows: list[Row] = []
    for batch, length in DECODES[::3] if quick else DECODES:
        rows += _decode_rows(pool, batch, length)
    for source in ("pages",) if quick else ("pages", "views"):
        for queries, before in PREFILLS[1:2] if quick else PREFILLS:
            rows += _prefill_rows(pool, queries, before, source)
    return rows


def _decode_rows(pool: Pool, batch: int, length: int) -> list[Row]:
    read_bytes = batch * length * _KV_HEADS * HEAD_DIM * 4
    paged = pool.paged(batch, length, _KV_HEADS, cold_sets(read_bytes))
    lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
    query = torch.randn(batch, HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")

    def call(kv: PagedKv, shape: DecodeShape) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: paged_decode(query, kv, lengths, scaling=_SCALING, max_length=length, shape=shape)

    found: list[tuple[float, AnyShape]] = []
    for shape in DECODE_SHAPES:
        try:
            found.append((graph_s([call(kv, shape) for kv in paged]), shape))
        except OutOfResources:
            continue
    limit = copy_bytes_per_s()
    return [
        Row(
            f"decode batch {batch}, length {length}: {_told(shape)}",
            1e6 * s,
            "us",
            read_bytes / s / limit,
            "device copy",
        )
        for s, shape in _fastest(found)
    ]


def _prefill_rows(pool: Pool, queries: int, before: int, source: str) -> list[Row]:
    keys = queries + before
    flop = 4 * HEADS * HEAD_DIM * queries * (before + (queries + 1) / 2)
    kv: PagedKv | ViewKv = (pool.paged if source == "pages" else pool.views)(1, keys, _KV_HEADS, 1)[0]
    query = torch.randn(queries, HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")
    starts = torch.tensor([0, queries], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([keys], dtype=torch.int32, device="cuda")

    def call(shape: PrefillShape) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: paged_prefill(query, kv, starts, lengths, scaling=_SCALING, max_queries=queries, shape=shape)

    found: list[tuple[float, AnyShape]] = []
    for shape in PREFILL_SHAPES:
        try:
            found.append((graph_s([call(shape)]), shape))
        except OutOfResources:
            continue
    name = f"prefill {queries} after {before} over {source}"
    return [
        Row(f"{name}: {_told(shape)}", flop / s / 1e12, "TFLOP/s", flop / s / matmul_flop_per_s(), "bf16 product")
        for s, shape in _fastest(found)
    ]


def _fastest(found: Iterable[tuple[float, AnyShape]]) -> list[tuple[float, AnyShape]]:
    return sorted(found, key=lambda one: one[0])[:_SHOWN]


def _told(shape: AnyShape) -> str:
    told = [str(getattr(shape, one.name)) for one in fields(shape) if one.name != "longest_split_tokens"]
    return f"{type(shape).__name__}({', '.join(told)})"


if __name__ == "__main__":
    run_and_write(run, __doc__)
