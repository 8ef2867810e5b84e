"""Attention of one new query for each of many sequences over their K and V in pages or in contiguous views (Triton).

Flash-decoding: the keys of a sequence are split over programs, and a second kernel merges what they found. A program
holds all query heads of one kv head, so that each key is read once.
Source: Flash-Decoding (https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import require
from kernels.kv_source import KvSource, PagedKv, check_query
from kernels.tiles import (
    ceiling,
    dot_constants,
    finished,
    load_rows,
    look_up,
    power_of_two,
    processors,
    rule_constants,
    scored,
    softmax_step,
    source_constants,
    token_rows,
)

_FEW_PROGRAMS = 16
_MERGED_AT_ONCE = 64
_MOST_PROGRAMS = 4096
_LEAST_TILES = tl.constexpr(2)


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """How the work is cut. The defaults of `decode_shape` come from benchmarks/gpu/attention.py."""

    tile_tokens: int
    warps: int
    stages: int
    programs_per_processor: int
    """At most that many for each of the device's processors come from splitting; all should run at once."""
    longest_split_tokens: int = 1024
    """One long sequence among many short ones must not keep few programs busy when the others have ended."""


def decode_shape(head_dim: int, dtype: torch.dtype, programs: int) -> DecodeShape:
    """The shape that `paged_decode` takes by itself, for so many pairs of a sequence and a kv head."""
    if dtype == torch.float32:
        return DecodeShape(tile_tokens=32, warps=8, stages=2, programs_per_processor=2)
    if head_dim > 128:
        return DecodeShape(tile_tokens=32, warps=4, stages=3, programs_per_processor=2)
    if programs <= _FEW_PROGRAMS:
        return DecodeShape(tile_tokens=32, warps=4, stages=4, programs_per_processor=8)
    return DecodeShape(tile_tokens=64, warps=4, stages=3, programs_per_processor=8)


def paged_decode(
    query: Tensor,
    kv: KvSource,
    lengths: Tensor,
    *,
    scaling: float,
    max_length: int,
    window_tokens: int | None = None,
    soft_cap: float | None = None,
    shape: DecodeShape | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest token of each sequence over its keys.

    query    [sequences, heads, head_dim], heads a multiple of kv_heads; heads contiguous
    lengths  int32 [sequences]: keys that lie in `kv`, the newest included; 0: a padding row, out 0 and lse -inf
    max_length bounds the lengths and with them the number of programs, most of which end at once where sequences are
    short: a graph captured for the longest context costs the short ones little. A longer sequence is right, but slower.
    With a window only the last `window_tokens` keys count; soft_cap c turns a scaled score s into c * tanh(s / c).
    Returns out [sequences, heads, head_dim] in the query's dtype, lse [sequences, heads] float32, natural logarithm.

    New tensors, current stream, no synchronisation: may be captured in a CUDA graph. Memory of pages that no length
    covers is never part of a result, whatever it holds. Tolerance 1e-5 in float32, 1e-2 in bfloat16 and float16.
    Raises KernelInputError for a wrong shape, dtype or device.
    """
    sequences, heads, head_dim = query.shape
    check_query(query, kv, sequences, lengths=lengths)
    require(lengths.shape[0] == sequences, "lengths", lengths.shape, "one for each query")
    require(scaling > 0.0, "scaling", scaling, "above 0")
    shape = shape or decode_shape(head_dim, query.dtype, sequences * kv.kv_heads)
    out = torch.empty(sequences, heads, head_dim, dtype=query.dtype, device=query.device)
    lse = torch.empty(sequences, heads, dtype=torch.float32, device=query.device)
    if sequences == 0:
        return out, lse
    reach = max_length if window_tokens is None else min(max_length, window_tokens + shape.tile_tokens)
    splits = count_splits(sequences * kv.kv_heads, reach, shape, query.device)
    part, part_lse = out, lse
    if splits.most > 1:
        part = torch.empty(sequences, heads, splits.most, head_dim, dtype=torch.float32, device=query.device)
        part_lse = torch.empty(sequences, heads, splits.most, dtype=torch.float32, device=query.device)
    group = heads // kv.kv_heads
    rules, source = rule_constants(window_tokens, soft_cap), source_constants(kv)
    cut = {"TILE": shape.tile_tokens, "LONGEST": shape.longest_split_tokens, "WINDOW": rules["WINDOW"]}
    _decode[(kv.kv_heads, splits.most, sequences)](
        query, kv.keys, kv.values, kv.places, lengths, part, part_lse,
        kv.page_shift if isinstance(kv, PagedKv) else 0, kv.places.stride(0),
        query.stride(0), query.stride(1), scaling, splits.to_fill, splits.most,
        GROUP=group, ROWS=max(16, power_of_two(group)), SPLIT=splits.most > 1, SOFT_CAP=rules["SOFT_CAP"],
        **cut, **source, **dot_constants(query), num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    if splits.most > 1:
        _merge_splits[(heads, sequences)](
            part, part_lse, lengths, out, lse, splits.to_fill, splits.most,
            HEAD_DIM=head_dim, BLOCK_DIM=source["BLOCK_DIM"], **cut, num_warps=4,
            CHUNK=min(_MERGED_AT_ONCE, max(16, power_of_two(splits.most))),
        )  # fmt: skip
    return out, lse


@dataclass(frozen=True, slots=True)
class Splits:
    """Into how many parts the keys of a sequence are cut: each program finds it out from the sequence's own length."""

    to_fill: int
    """Parts of every sequence that keep the device busy."""
    most: int
    """Programs for each kv head of a sequence; longer sequences use more of them."""


def count_splits(programs: int, reach_tokens: int, shape: DecodeShape, device: torch.device) -> Splits:
    """For `programs` pairs of a sequence and a kv head, none of which reads more than `reach_tokens` keys."""
    to_fill = max(
        1, shape.programs_per_processor * processors(device) // programs
    )  # one more would begin a second wave
    to_share = min(ceiling(reach_tokens, shape.longest_split_tokens), ceiling(_MOST_PROGRAMS, programs))
    worthwhile = max(1, ceiling(reach_tokens, _LEAST_TILES.value * shape.tile_tokens))
    return Splits(to_fill, min(max(to_fill, to_share), worthwhile))


@triton.jit
def _share(
    length: tl.tensor,
    to_fill: tl.tensor,
    splits: tl.tensor,
    TILE: tl.constexpr,
    LONGEST: tl.constexpr,
    WINDOW: tl.constexpr,
) -> tl.tensor:
    """(first tile that is seen, tiles seen, tiles of each split)."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // TILE
    tiles = tl.cdiv(length, TILE) - first
    parts = tl.minimum(tl.maximum(to_fill, tl.cdiv(tiles * TILE, LONGEST)), splits)
    share = tl.cdiv(tiles, parts)
    if parts > 1:
        share = tl.maximum(share, _LEAST_TILES)
    return first, tiles, share


@triton.jit(do_not_specialize=["page_shift", "place_stride", "to_fill", "splits"])
def _decode(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    places: tl.tensor,
    lengths: tl.tensor,
    part: tl.tensor,
    part_lse: tl.tensor,
    page_shift: tl.tensor,
    place_stride: tl.tensor,
    query_stride: tl.tensor,
    head_stride: tl.tensor,
    scaling: tl.tensor,
    to_fill: tl.tensor,
    splits: tl.tensor,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    LONGEST: tl.constexpr,
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
    """One split of one kv head of one sequence."""
    kv_head, split, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(0) * GROUP
    length = tl.load(lengths + sequence)
    first, tiles, share = _share(length, to_fill, splits, TILE, LONGEST, WINDOW)
    begin = split * share
    end = tl.minimum(begin + share, tiles)
    if SPLIT:  # noqa: SIM102 - decided when the kernel is compiled, the next one when it runs
        if begin >= end:
            return
    dims = tl.arange(0, BLOCK_DIM)
    rows = tl.arange(0, ROWS)
    head = kv_head * GROUP + rows
    mine = (rows[:, None] < GROUP) & (dims[None, :] < HEAD_DIM)
    at = sequence.to(tl.int64) * query_stride + head[:, None] * head_stride + dims[None, :]
    q = tl.load(query + at, mine, 0.0).to(DOT)
    place = places + sequence.to(tl.int64) * place_stride
    column = kv_head * HEAD_DIM
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    found = look_up((first + begin) * TILE + tl.arange(0, TILE), length, place, PAGED, BLOCK_TOKENS)
    for tile in range(first + begin, first + end):
        tokens = tile * TILE + tl.arange(0, TILE)
        seen = tokens < length
        if WINDOW > 0:
            seen = seen & (tokens >= length - WINDOW)
        lie = column + token_rows(found, tokens, page_shift, PAGED, BLOCK_TOKENS, PAGE_ELEMENTS, TOKEN_ELEMENTS)
        if PAGED:
            found = look_up(tokens + TILE, length, place, PAGED, BLOCK_TOKENS)
        k = load_rows(keys, lie, dims, seen, HEAD_DIM, BLOCK_DIM, True).to(DOT)
        scores, factor = scored(tl.dot(q, tl.trans(k), input_precision=PRECISION), scaling, SOFT_CAP)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        weights, shrink, highest, total = softmax_step(scores, factor, highest, total)
        v = load_rows(values, lie, dims, seen, HEAD_DIM, BLOCK_DIM, True).to(DOT)
        sums = sums * shrink[:, None] + tl.dot(weights.to(DOT), v, input_precision=PRECISION)
    out, lse = finished(sums, highest, total)
    slot = sequence.to(tl.int64) * heads + head
    if SPLIT:
        slot = slot * splits + split
    tl.store(part + slot[:, None] * HEAD_DIM + dims[None, :], out.to(part.dtype.element_ty), mine)
    tl.store(part_lse + slot, lse, rows < GROUP)


@triton.jit(do_not_specialize=["to_fill", "splits"])
def _merge_splits(
    part: tl.tensor,
    part_lse: tl.tensor,
    lengths: tl.tensor,
    out: tl.tensor,
    out_lse: tl.tensor,
    to_fill: tl.tensor,
    splits: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TILE: tl.constexpr,
    LONGEST: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Merge what the splits of one head of one sequence found; reads only splits that had keys."""
    head, sequence = tl.program_id(0), tl.program_id(1)
    slot = sequence.to(tl.int64) * tl.num_programs(0) + head
    length = tl.load(lengths + sequence)
    _, tiles, share = _share(length, to_fill, splits, TILE, LONGEST, WINDOW)
    used = tl.cdiv(tiles, tl.maximum(share, 1))
    dims = tl.arange(0, BLOCK_DIM)
    highest = float("-inf")
    total = 0.0
    sums = tl.zeros([BLOCK_DIM], tl.float32)
    for begin in range(0, used, CHUNK):
        split = begin + tl.arange(0, CHUNK)
        here = split < used
        lse = tl.load(part_lse + slot * splits + split, here, float("-inf")) * 1.4426950408889634
        at = (slot * splits + split)[:, None] * HEAD_DIM + dims[None, :]
        found = tl.load(part + at, here[:, None] & (dims[None, :] < HEAD_DIM), 0.0)
        raised = tl.maximum(highest, tl.max(lse, 0))
        weight = tl.exp2(lse - raised)
        shrink = tl.exp2(highest - raised)
        sums = sums * shrink + tl.sum(found * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        highest = raised
    divisor = tl.where(total > 0.0, total, 1.0)
    tl.store(out + slot * HEAD_DIM + dims, (sums / divisor).to(out.dtype.element_ty), dims < HEAD_DIM)
    lse = tl.where(total > 0.0, (highest + tl.log2(divisor)) * 0.6931471805599453, float("-inf"))
    tl.store(out_lse + slot, lse)
