"""Attention of runs of new queries over their sequences' K and V in pages or in contiguous views (Triton).

A program holds a block of rows; a row is one query head of one token, and the heads that share a kv head lie side by
side, so that a block spans few tokens and little of the diagonal is computed in vain. Tiles of keys that every row
sees whole take no mask.
Source: FlashAttention-2 (arXiv 2307.08691); queries after a cached prefix as in "PagedAttention" (arXiv 2309.06180).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import require
from kernels.kv_source import KvSource, PagedKv, check_query
from kernels.merge_kernel import merge_parts
from kernels.tiles import (
    ceiling,
    dot_constants,
    finished,
    load_rows,
    look_up,
    rule_constants,
    scored,
    softmax_step,
    source_constants,
    takes_large_tiles,
    token_rows,
)


@dataclass(frozen=True, slots=True)
class PrefillShape:
    """How the work is cut. The defaults of `prefill_shape` come from benchmarks/gpu/attention.py."""

    rows: int
    tile_tokens: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs of queries, one of each sequence; see `paged_prefill`."""

    query_starts: Tensor
    lengths: Tensor
    max_queries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Which keys a query sees, and what its scores become; see `paged_prefill`."""

    scaling: float
    strict: bool = False
    window_tokens: int | None = None
    soft_cap: float | None = None


def prefill_shape(head_dim: int, dtype: torch.dtype, *, paged: bool, device: torch.device) -> PrefillShape:
    """The shape that `paged_prefill` takes by itself: large tiles share what it costs to look pages up."""
    if dtype == torch.float32:
        return PrefillShape(rows=32 if head_dim <= 128 else 16, tile_tokens=32, warps=8, stages=1)
    if not takes_large_tiles(device):
        return PrefillShape(rows=64, tile_tokens=64 if head_dim <= 128 else 16, warps=4, stages=2)
    if head_dim > 128:
        return PrefillShape(rows=128, tile_tokens=32, warps=8, stages=2)
    if paged:
        return PrefillShape(rows=128, tile_tokens=128, warps=8, stages=3)
    return PrefillShape(rows=64, tile_tokens=64, warps=4, stages=3)


def paged_prefill(
    query: Tensor,
    kv: KvSource,
    query_starts: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    max_queries: int,
    strict: bool = False,
    window_tokens: int | None = None,
    soft_cap: float | None = None,
    shape: PrefillShape | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last tokens of each sequence over all of its keys.

    query         [tokens, heads, head_dim], the runs one after the other; heads contiguous
    query_starts  int32 [sequences + 1]: sequence s has the queries query_starts[s] .. query_starts[s + 1] - 1
    lengths       int32 [sequences]: keys of each sequence; its queries belong to the last ones of them
    max_queries   at least the longest run; programs past a run's end do nothing
    `strict` hides the key at a query's own position too (striped layouts). With a window a query at i sees keys at j
    with i - j < window_tokens. soft_cap c turns a scaled score s into c * tanh(s / c).
    Returns out [tokens, heads, head_dim] in the query's dtype, lse [tokens, heads] float32, natural logarithm; a query
    that sees nothing: out 0, lse -inf.

    New tensors, current stream, no synchronisation. Memory that no length covers is never part of a result, whatever
    it holds. Tolerance 1e-5 in float32, 1e-2 in bfloat16 and float16. Raises KernelInputError for a wrong shape,
    dtype or device.
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    rules = Rules(scaling=scaling, strict=strict, window_tokens=window_tokens, soft_cap=soft_cap)
    prefill_into((out, lse), query, kv, Runs(query_starts, lengths, max_queries), rules, shape)
    return out, lse


def prefill_into(
    results: tuple[Tensor, Tensor],
    query: Tensor,
    kv: KvSource,
    runs: Runs,
    rules: Rules,
    shape: PrefillShape | None = None,
) -> None:
    """As `paged_prefill` into (out, lse), contiguous and of query's rows; rows that no run names stay as they are."""
    out, lse = results
    _launch((out[None], lse[None]), query, kv, runs, rules, shape)


def prefill_in_splits(
    query: Tensor, kv: KvSource, runs: Runs, rules: Rules, splits: int, shape: PrefillShape | None = None
) -> tuple[Tensor, Tensor]:
    """As `paged_prefill`, each run's keys in `splits` parts: for few queries after many keys. Memory grows with splits."""
    part = torch.empty(splits, *query.shape, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(splits, *query.shape[:2], dtype=torch.float32, device=query.device)
    _launch((part, part_lse), query, kv, runs, rules, shape)
    return merge_parts(part, part_lse, query.dtype)


def _launch(
    parts: tuple[Tensor, Tensor], query: Tensor, kv: KvSource, runs: Runs, rules: Rules, shape: PrefillShape | None
) -> None:
    """Fill parts [splits, tokens, heads, head_dim] and [splits, tokens, heads], one share of the keys in each."""
    (tokens, heads, head_dim), splits = query.shape, parts[0].shape[0]
    sequences = runs.lengths.shape[0]
    check_query(query, kv, sequences, lengths=runs.lengths, query_starts=runs.query_starts)
    starts = runs.query_starts.shape
    require(starts[0] == sequences + 1, "query_starts", starts, "one more than lengths")
    require(rules.scaling > 0.0, "scaling", rules.scaling, "above 0")
    if runs.max_queries == 0 or sequences == 0:
        return
    shape = shape or prefill_shape(head_dim, query.dtype, paged=isinstance(kv, PagedKv), device=query.device)
    group = heads // kv.kv_heads
    _prefill[(ceiling(runs.max_queries * group, shape.rows), kv.kv_heads, sequences * splits)](
        query, kv.keys, kv.values, kv.places, runs.query_starts, runs.lengths, *parts,
        kv.page_shift if isinstance(kv, PagedKv) else 0, kv.places.stride(0),
        query.stride(0), query.stride(1), rules.scaling, splits, tokens,
        GROUP=group, ROWS=shape.rows, TILE=shape.tile_tokens, STRICT=int(rules.strict),
        **rule_constants(rules.window_tokens, rules.soft_cap), **source_constants(kv), **dot_constants(query),
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip


@triton.jit
def _over_tiles(
    state: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    place: tl.tensor,
    page_shift: tl.tensor,
    column: tl.tensor,
    dims: tl.tensor,
    position: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    scaling: tl.tensor,
    MASKED: tl.constexpr,
    STRICT: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PAGED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PAGE_ELEMENTS: tl.constexpr,
    TOKEN_ELEMENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Take the keys begin .. end - 1 in, a tile at a time. Without MASKED every row must see all of them."""
    sums, highest, total = state
    found = look_up(begin + tl.arange(0, TILE), end, place, PAGED, BLOCK_TOKENS)
    for start in range(begin, end, TILE):
        tokens = start + tl.arange(0, TILE)
        exist = tokens < end
        lie = column + token_rows(found, tokens, page_shift, PAGED, BLOCK_TOKENS, PAGE_ELEMENTS, TOKEN_ELEMENTS)
        if PAGED:
            found = look_up(tokens + TILE, end, place, PAGED, BLOCK_TOKENS)
        k = load_rows(keys, lie, dims, exist, HEAD_DIM, BLOCK_DIM, MASKED).to(DOT)
        scores, factor = scored(tl.dot(q, tl.trans(k), input_precision=PRECISION), scaling, SOFT_CAP)
        if MASKED:
            seen = tokens[None, :] <= position[:, None] - STRICT
            if WINDOW > 0:
                seen = seen & (position[:, None] - tokens[None, :] < WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        weights, shrink, highest, total = softmax_step(scores, factor, highest, total)
        v = load_rows(values, lie, dims, exist, HEAD_DIM, BLOCK_DIM, MASKED).to(DOT)
        sums = tl.dot(weights.to(DOT), v, sums * shrink[:, None], input_precision=PRECISION)
    return sums, highest, total


@triton.jit(do_not_specialize=["page_shift", "place_stride", "splits", "rows_of_split"])
def _prefill(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    places: tl.tensor,
    query_starts: tl.tensor,
    lengths: tl.tensor,
    out: tl.tensor,
    out_lse: tl.tensor,
    page_shift: tl.tensor,
    place_stride: tl.tensor,
    query_stride: tl.tensor,
    head_stride: tl.tensor,
    scaling: tl.tensor,
    splits: tl.tensor,
    rows_of_split: tl.tensor,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STRICT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PAGED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PAGE_ELEMENTS: tl.constexpr,
    TOKEN_ELEMENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One block of rows of one kv head of one sequence and one share of their keys; the last blocks, which have the most keys, start first."""
    kv_head = tl.program_id(1)
    sequence, split = tl.program_id(2) // splits, tl.program_id(2) % splits
    run = tl.load(query_starts + sequence)
    queries = tl.load(query_starts + sequence + 1) - run
    block = tl.cdiv(queries * GROUP, ROWS) - 1 - tl.program_id(0)
    if block < 0:
        return
    before = tl.load(lengths + sequence) - queries
    row = block * ROWS + tl.arange(0, ROWS)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    dims = tl.arange(0, BLOCK_DIM)
    position = before + token
    mine = token < queries
    wide = mine[:, None] & (dims[None, :] < HEAD_DIM)
    at = (run + token).to(tl.int64)
    q = tl.load(query + at[:, None] * query_stride + head[:, None] * head_stride + dims[None, :], wide, 0.0).to(DOT)
    place = places + sequence.to(tl.int64) * place_stride
    column = kv_head * HEAD_DIM

    lowest = before + block * ROWS // GROUP
    highest_position = before + tl.minimum((block * ROWS + ROWS - 1) // GROUP, queries - 1)
    end = tl.maximum(highest_position + 1 - STRICT, 0)
    whole_end = tl.maximum(lowest + 1 - STRICT, 0) // TILE * TILE  # up to here every row sees every key
    begin = 0
    whole_begin = 0
    state = (
        tl.zeros([ROWS, BLOCK_DIM], tl.float32),
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
    )
    if WINDOW > 0:
        begin = tl.maximum(lowest - WINDOW + 1, 0) // TILE * TILE
        whole_begin = tl.cdiv(tl.maximum(highest_position - WINDOW + 1, 0), TILE) * TILE
    share = tl.cdiv(tl.cdiv(end - begin, TILE), splits) * TILE
    begin += split * share
    end = tl.minimum(begin + share, end)
    if WINDOW > 0:
        state = _over_tiles(
            state, q, keys, values, place, page_shift, column, dims, position, begin, tl.minimum(whole_begin, end),
            scaling, True, STRICT, TILE, WINDOW, SOFT_CAP, PAGED, BLOCK_TOKENS, PAGE_ELEMENTS, TOKEN_ELEMENTS,
            HEAD_DIM, BLOCK_DIM, DOT, PRECISION,
        )  # fmt: skip
    state = _over_tiles(
        state, q, keys, values, place, page_shift, column, dims, position,
        tl.maximum(begin, whole_begin), tl.minimum(whole_end, end),
        scaling, False, STRICT, TILE, WINDOW, SOFT_CAP, PAGED, BLOCK_TOKENS, PAGE_ELEMENTS, TOKEN_ELEMENTS,
        HEAD_DIM, BLOCK_DIM, DOT, PRECISION,
    )  # fmt: skip
    state = _over_tiles(
        state, q, keys, values, place, page_shift, column, dims, position,
        tl.maximum(begin, tl.maximum(whole_begin, whole_end)), end,
        scaling, True, STRICT, TILE, WINDOW, SOFT_CAP, PAGED, BLOCK_TOKENS, PAGE_ELEMENTS, TOKEN_ELEMENTS,
        HEAD_DIM, BLOCK_DIM, DOT, PRECISION,
    )  # fmt: skip
    result, lse = finished(state[0], state[1], state[2])
    slot = (split.to(tl.int64) * rows_of_split + at) * (tl.num_programs(1) * GROUP) + head
    tl.store(out + slot[:, None] * HEAD_DIM + dims[None, :], result.to(out.dtype.element_ty), wide)
    tl.store(out_lse + slot, lse, mine)
