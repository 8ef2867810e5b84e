"""Attention kernels against the card's limits, torch's own kernels, and a gather before them.

Decode: microseconds, and the share of the device's copy bandwidth at which K and V are read. Prefill: TFLOP/s, and the
share of the card's matrix rate. Llama-3-8B's shape: 32 heads of 128, 8 kv heads, bfloat16, blocks of 16 tokens.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu._attention_inputs import DTYPE, HEAD_DIM, HEADS, Pool, cold_sets, eager_s, graph_s
from benchmarks.gpu.limits import copy_bytes_per_s, matmul_flop_per_s
from benchmarks.gpu.table import Row, run_and_write
from kernels.fused_attention import copied_keys_values, cudnn_attention
from kernels.kv_source import PagedKv, ViewKv
from kernels.merge import merge_partials
from kernels.paged_decode import paged_decode
from kernels.paged_prefill import Runs, paged_prefill
from kernels.prefill_choice import prefill_runs

_POOL_BYTES = 16 * 2**30
_SCALING = HEAD_DIM**-0.5
_EAGER_QUERIES = 4096
"""Runs that are long enough to hide their launches; of shorter ones only the device's time is told."""


@dataclass(frozen=True)
class Decode:
    batch: int
    length: int
    group: int
    compared: bool = False
    ragged: bool = False
    bound: int | None = None
    """What the lengths stay below, as a graph for all contexts knows it."""

    @property
    def kv_heads(self) -> int:
        return HEADS // self.group

    @property
    def name(self) -> str:
        lengths = "mixed lengths up to" if self.ragged else "length"
        bound = f" of at most {self.bound}" if self.bound else ""
        return f"decode batch {self.batch}, {lengths} {self.length}{bound}, {self.group} heads per kv head"

    @property
    def kv_bytes(self) -> int:
        return self.batch * self.length * self.kv_heads * HEAD_DIM * 2 * 2


DECODES = [Decode(batch, length, 4, compared=True) for batch in (1, 8, 32, 128) for length in (512, 4096, 32768)]
DECODES += [Decode(batch, length, group) for group in (1, 8) for batch, length in ((1, 32768), (32, 4096), (128, 512))]
DECODES += [Decode(128, 32768, 8), Decode(32, 32768, 4, ragged=True), Decode(128, 8192, 4, ragged=True)]
DECODES += [Decode(batch, length, 4, bound=131072) for batch, length in ((1, 4096), (32, 512), (128, 4096))]
QUICK_DECODES = [Decode(1, 4096, 4), Decode(32, 4096, 4, compared=True), Decode(128, 512, 1), Decode(128, 4096, 4)]
PREFILLS = [(1024, 0), (4096, 0), (16384, 0), (32768, 0), (512, 4096), (2048, 30720), (8192, 24576), (64, 16384)]
QUICK_PREFILLS = [(4096, 0), (16384, 0), (2048, 30720)]


def run(quick: bool) -> list[Row]:
    """All rows; a kernel of torch's that refuses a shape is left out with its reason."""
    pool = Pool.of(_POOL_BYTES // 4 if quick else _POOL_BYTES)
    rows: list[Row] = []
    for case in QUICK_DECODES if quick else DECODES:
        rows += decode_rows(pool, case)
    for queries, before in QUICK_PREFILLS if quick else PREFILLS:
        rows += prefill_rows(pool, queries, before)
    rows += batch_rows(pool)
    return [*rows, plan_row(pool)]


def decode_rows(pool: Pool, case: Decode) -> list[Row]:
    """Ours over pages and views, and what else can do it."""
    sets = cold_sets(case.kv_bytes)
    lengths = torch.full((case.batch,), case.length, dtype=torch.int32, device="cuda")
    if case.ragged:
        lengths = (torch.arange(1, case.batch + 1, device="cuda") ** 2 * case.length // case.batch**2).to(torch.int32)
    read_bytes = int(lengths.sum()) * case.kv_heads * HEAD_DIM * 4
    query = torch.randn(case.batch, HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")

    def ours(kv: PagedKv | ViewKv) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: paged_decode(query, kv, lengths, scaling=_SCALING, max_length=case.bound or case.length)

    paged = pool.paged(case.batch, case.length, case.kv_heads, sets)
    views = pool.views(case.batch, case.length, case.kv_heads, sets)
    paged_s = graph_s([ours(kv) for kv in paged])
    rows = [_bandwidth_row(f"{case.name}, pages", paged_s, read_bytes)]
    rows.append(_bandwidth_row(f"{case.name}, views", graph_s([ours(kv) for kv in views]), read_bytes))
    if case.compared:
        pairs = pool.contiguous(case.batch, case.length, case.kv_heads, sets)
        _same(ours(views[0])()[0], _sdpa(query, *pairs[0])()[:, :, 0])
        for name, calls in _decode_rivals(query, paged, pairs).items():
            rows.append(_against(f"{case.name}, {name}", partial(graph_s, calls), paged_s))
    return rows


def _decode_rivals(
    query: Tensor, paged: list[PagedKv], pairs: list[tuple[Tensor, Tensor]]
) -> dict[str, list[Callable[[], Tensor]]]:
    def gathered(kv: PagedKv) -> Tensor:
        sequences, blocks = kv.table.shape
        chosen = kv.pages.index_select(0, kv.table.view(-1)).view(sequences, blocks, 2, -1)
        shape = (sequences, -1, kv.kv_heads, HEAD_DIM)
        return _sdpa(query, chosen[:, :, 0].reshape(shape), chosen[:, :, 1].reshape(shape))()

    def flash(key: Tensor, value: Tensor) -> Tensor:
        kernel = torch.ops.aten._flash_attention_forward
        out: Tensor = kernel(
            query[:, None], key, value, None, None, 1, key.shape[1], 0.0, False, False, scale=_SCALING
        )[0]
        return out

    return {
        "torch SDPA, contiguous": [_sdpa(query, *pair) for pair in pairs],
        "torch flash, contiguous": [partial(flash, *pair) for pair in pairs],
        "gather, then torch SDPA": [partial(gathered, kv) for kv in paged],
    }


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    return lambda: scaled_dot_product_attention(
        query[:, :, None], key.transpose(1, 2), value.transpose(1, 2), scale=_SCALING, enable_gqa=True
    )


def prefill_rows(pool: Pool, queries: int, before: int) -> list[Row]:
    """One run of queries after a cached prefix."""
    runs = _runs([(queries, before + queries)])
    keys = queries + before
    flop = 4 * HEADS * HEAD_DIM * queries * (before + (queries + 1) / 2)
    query = torch.randn(queries, HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")
    paged, view = pool.paged(1, keys, HEADS // 4, 1)[0], pool.views(1, keys, HEADS // 4, 1)[0]
    key, value = copied_keys_values(paged, 0, keys)
    ways: dict[str, Callable[[], Tensor]] = {
        "pages": lambda: _paged_prefill(query, paged, runs),
        "views": lambda: _paged_prefill(query, view, runs),
        "torch flash, contiguous": lambda: _flash(query, key, value, runs),
        "gather, then torch flash": lambda: _flash(query, *copied_keys_values(paged, 0, keys), runs),
        "cuDNN, contiguous": lambda: _cudnn(query, key, value),
        "gather, then cuDNN": lambda: _cudnn(query, *copied_keys_values(paged, 0, keys)),
        "as served": lambda: prefill_runs(
            query, paged, runs.query_starts, runs.lengths, [(queries, keys)], scaling=_SCALING
        ),
    }
    name = f"prefill {queries} after {before}"
    meant = ways["pages"]()
    rows: list[Row] = []
    for way, call in ways.items():
        try:
            if way != "views":
                _same(call(), meant)
            rate = flop / (eager_s(call) if queries >= _EAGER_QUERIES else graph_s([call]))
        except (RuntimeError, AssertionError) as error:
            rows.append(_refused(f"{name}, {way}", error))
            continue
        rows.append(Row(f"{name}, {way}", rate / 1e12, "TFLOP/s", rate / matmul_flop_per_s(), "bf16 product"))
    return rows


def batch_rows(pool: Pool) -> list[Row]:
    """Many short runs at once, fresh and after prefixes, as a step of mixed work has them."""
    rows: list[Row] = []
    for name, counts in (
        ("16 runs of 512", [(512, 512)] * 16),
        ("64 runs of 32 after 1024", [(32, 1056)] * 64),
    ):
        runs = _runs(counts)
        paged = pool.paged(len(counts), max(keys for _, keys in counts), HEADS // 4, 1)[0]
        query = torch.randn(sum(queries for queries, _ in counts), HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")
        flop = sum(4 * HEADS * HEAD_DIM * queries * (keys - (queries - 1) / 2) for queries, keys in counts)
        rate = flop / graph_s([partial(_paged_prefill, query, paged, runs)])
        rows.append(Row(f"prefill {name}, pages", rate / 1e12, "TFLOP/s", rate / matmul_flop_per_s(), "bf16 product"))
        per_run = [copied_keys_values(paged, sequence, keys) for sequence, (_, keys) in enumerate(counts)]
        key, value = (torch.cat([pair[side] for pair in per_run]) for side in (0, 1))

        def flash(query: Tensor = query, key: Tensor = key, value: Tensor = value, runs: Runs = runs) -> Tensor:
            return _flash(query, key, value, runs)

        rows.append(_against(f"prefill {name}, torch flash, contiguous", lambda: graph_s([flash]), flop / rate))
    return rows


def plan_row(pool: Pool) -> Row:
    """What a length that cuDNN has not seen costs the host."""
    key, value = (one[0] for one in pool.contiguous(1, 4096, HEADS // 4, 1)[0])
    query = torch.randn(4096, HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")

    def seconds(n: int) -> float:
        return _host_s(lambda: _cudnn(query[:n], key[:n], value[:n]))

    _, again_s, first_s, other_s = (seconds(n) for n in (3001, 3001, 2977, 2953))
    return Row("cuDNN, a new length", 500 * (first_s + other_s), "ms", other_s / again_s, "the same length again")


def _host_s(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began_s


def _runs(counts: list[tuple[int, int]]) -> Runs:
    lengths = torch.tensor([keys for _, keys in counts], dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, *(queries for queries, _ in counts)], device="cuda").cumsum(0, dtype=torch.int32)
    return Runs(starts, lengths, max(queries for queries, _ in counts))


def _paged_prefill(query: Tensor, kv: PagedKv | ViewKv, runs: Runs) -> Tensor:
    return paged_prefill(query, kv, runs.query_starts, runs.lengths, scaling=_SCALING, max_queries=runs.max_queries)[0]


def _flash(query: Tensor, key: Tensor, value: Tensor, runs: Runs) -> Tensor:
    key_starts = torch.nn.functional.pad(runs.lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = (runs.max_queries, key.shape[0] // runs.lengths.shape[0])  # runs of one benchmark are equal
    kernel = torch.ops.aten._flash_attention_forward
    out: Tensor = kernel(query, key, value, runs.query_starts, key_starts, *longest, 0.0, True, False, scale=_SCALING)[
        0
    ]
    return out


def _cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    before = key.shape[0] - query.shape[0]
    own = cudnn_attention(query, key[before:], value[before:], scaling=_SCALING, causal=True)
    if before == 0:
        return own[0]
    return merge_partials(*cudnn_attention(query, key[:before], value[:before], scaling=_SCALING, causal=False), *own)[
        0
    ]


def _same(found: Tensor, meant: Tensor) -> None:
    """Averages over many random values are small: their error is judged against their own size."""
    error = float((found.float() - meant.float()).norm() / meant.float().norm())
    assert error < 2e-2, f"off by {error:.3g} of the result's size"


def _bandwidth_row(name: str, seconds: float, read_bytes: int) -> Row:
    return Row(name, 1e6 * seconds, "us", read_bytes / seconds / copy_bytes_per_s(), "device copy")


def _against(name: str, measure: Callable[[], float], ours_s: float) -> Row:
    try:
        seconds = measure()
    except RuntimeError as error:
        return _refused(name, error)
    return Row(name, 1e6 * seconds, "us", seconds / ours_s, "ours over pages")


def _refused(name: str, error: BaseException) -> Row:
    reason = str(error).strip().splitlines()[0][:90].replace("|", "/")
    return Row(name, float("nan"), "", None, f"{type(error).__name__}: {reason}")


if __name__ == "__main__":
    run_and_write(run, __doc__)
