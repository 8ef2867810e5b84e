"""Which kernel computes a run of new queries: ours over the pages themselves, or cuDNN's over a copy of them.

Few queries after many keys, as after a long cached prefix, would leave most of the device idle: their keys are split.

A copy costs time that grows with the keys, attention time that grows with queries times keys: for long runs the copy is
lost in it, and cuDNN is the faster of the two there. But it makes a plan for each pair of lengths it has not met, so
it gets lengths of a coarse grain only: queries filled up with zeros, and a prefix in pieces of few sizes. The rates
below are from benchmarks/gpu/attention.py.
"""

import enum
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.fused_attention import copied_keys_values, cudnn_attention
from kernels.kv_source import PagedKv
from kernels.merge import merge_partials
from kernels.paged_prefill import Rules, Runs, prefill_in_splits, prefill_into
from kernels.tiles import ceiling, processors

_LIBRARY_DTYPES = (torch.bfloat16, torch.float16)
_LIBRARY_HEAD_DIMS = (64, 128)
_LEAST_QUERIES = 2048
_GRAIN_TOKENS = 1024
_LARGEST_PIECE_TOKENS = 32 * _GRAIN_TOKENS
_LIBRARY_SPEEDUP = 1.35
"""Rate of cuDNN over ours."""
_COPY_FLOP = 27e9
"""What ours computes in the time that a copy and the launches around it take."""
_WORTHWHILE = 0.95
_BLOCK_ROWS = 128
"""Rows of a program of `paged_prefill`, as it mostly has them."""
_LEAST_PART_TOKENS = 512
_MOST_PARTS = 32


def prefill_runs(
    query: Tensor,
    kv: PagedKv,
    query_starts: Tensor,
    lengths: Tensor,
    counts: Sequence[tuple[int, int]],
    *,
    scaling: float,
    window_tokens: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Causal attention of the last tokens of each sequence over all of its keys, as `paged_prefill`, which see.

    counts  (queries, keys) of each sequence, as query_starts and lengths say on the device
    Returns out [tokens, heads, head_dim]. No synchronisation.
    """
    rules = Rules(scaling=scaling, window_tokens=window_tokens, soft_cap=soft_cap)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    for stretch in _stretches(query, kv, counts, rules):
        own, runs = kv, Runs(query_starts, lengths, max(queries for queries, _ in stretch.counts))
        if len(stretch.counts) < len(counts):
            first, last = stretch.sequences.start, stretch.sequences.stop
            own = PagedKv(kv.pages, kv.table[first:last], kv.page_shift)
            runs = Runs(query_starts[first : last + 1], lengths[first:last], runs.max_queries)
        if stretch.way is _Way.COPY:
            found = _run_over_copy((out, lse), query, own, runs, stretch, rules)
            if len(counts) == 1:
                return found
            out[stretch.rows] = found
        elif stretch.way is _Way.SPLIT and (parts := _parts(query, kv, stretch.counts, window_tokens)) > 1:
            relative = Runs(runs.query_starts - stretch.rows.start, runs.lengths, runs.max_queries)
            out[stretch.rows] = prefill_in_splits(query[stretch.rows], own, relative, rules, parts)[0]
        else:
            prefill_into((out, lse), query, own, runs, rules)
    return out


def _parts(query: Tensor, kv: PagedKv, counts: Sequence[tuple[int, int]], window_tokens: int | None) -> int:
    """Into how many the keys of these runs are best split, so that their programs fill the device."""
    longest = max(keys if window_tokens is None else min(keys, window_tokens + queries) for queries, keys in counts)
    group = query.shape[1] // kv.kv_heads
    programs = kv.kv_heads * sum(ceiling(queries * group, _BLOCK_ROWS) for queries, _ in counts)
    return min(processors(query.device) // max(programs, 1), longest // _LEAST_PART_TOKENS, _MOST_PARTS)


def pays_to_copy(query: Tensor, queries: int, keys: int) -> bool:
    """Whether cuDNN over a copy of the keys is well faster than our kernel over the pages."""
    if query.dtype not in _LIBRARY_DTYPES or query.shape[2] not in _LIBRARY_HEAD_DIMS or queries < _LEAST_QUERIES:
        return False
    before = keys - queries
    prefix, filled_up = _whole_grains(before), _filled_up(queries)
    if prefix == before:
        by_ours, by_library = 0.0, filled_up * (before + filled_up / 2)
    else:
        by_ours, by_library = queries * (before - prefix + queries / 2), filled_up * prefix
    pair_flop = 4 * query.shape[1] * query.shape[2]
    mixed_flop = pair_flop * (by_ours + by_library / _LIBRARY_SPEEDUP) + _COPY_FLOP
    return mixed_flop < _WORTHWHILE * pair_flop * queries * (before + queries / 2)


class _Way(enum.Enum):
    COPY = enum.auto()
    SPLIT = enum.auto()
    PAGES = enum.auto()


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Neighbouring sequences that one way computes; one over a copy is alone."""

    sequences: slice
    rows: slice
    counts: tuple[tuple[int, int], ...]
    way: _Way


def _stretches(query: Tensor, kv: PagedKv, counts: Sequence[tuple[int, int]], rules: Rules) -> Iterator[_Stretch]:
    plain = rules.window_tokens is None and rules.soft_cap is None and _GRAIN_TOKENS % kv.block_tokens == 0

    def way(count: tuple[int, int]) -> _Way:
        if plain and pays_to_copy(query, *count):
            return _Way.COPY
        return _Way.SPLIT if _parts(query, kv, (count,), rules.window_tokens) > 1 else _Way.PAGES

    first = row = 0
    for found, group in itertools.groupby(counts, way):
        members = list(group)
        for some in ([one] for one in members) if found is _Way.COPY else (members,):
            end = row + sum(queries for queries, _ in some)
            yield _Stretch(slice(first, first + len(some)), slice(row, end), tuple(some), found)
            first, row = first + len(some), end


def _run_over_copy(
    results: tuple[Tensor, Tensor], query: Tensor, kv: PagedKv, runs: Runs, stretch: _Stretch, rules: Rules
) -> Tensor:
    """The prefix in whole grains by cuDNN; what follows too if it is the queries' own keys, or else over the pages."""
    ((queries, keys),) = stretch.counts
    prefix, room = _whole_grains(keys - queries), _filled_up(queries)
    mine = query[stretch.rows]
    filled = torch.cat([mine, mine.new_zeros(room - queries, *mine.shape[1:])]) if room > queries else mine
    if prefix == keys - queries:
        key, value = copied_keys_values(kv, 0, keys, prefix + room)
        found = cudnn_attention(filled, key[prefix:], value[prefix:], scaling=rules.scaling, causal=True)
    else:
        key, value = copied_keys_values(kv, 0, prefix)
        after = PagedKv(kv.pages, kv.table[:, prefix // kv.block_tokens :], kv.page_shift)
        prefill_into(results, query, after, Runs(runs.query_starts, runs.lengths - prefix, queries), rules)
        found = results[0][stretch.rows], results[1][stretch.rows]
    found = found[0][:queries], found[1][:queries]
    for piece in _pieces(prefix):
        part = cudnn_attention(filled, key[piece], value[piece], scaling=rules.scaling, causal=False)
        found = merge_partials(*found, part[0][:queries], part[1][:queries])
    return found[0]


def _whole_grains(tokens: int) -> int:
    return tokens // _GRAIN_TOKENS * _GRAIN_TOKENS


def _filled_up(tokens: int) -> int:
    return ceiling(tokens, _GRAIN_TOKENS) * _GRAIN_TOKENS


def _pieces(tokens: int) -> Iterator[slice]:
    """Powers of two of grains, the largest first."""
    begin = 0
    size = _LARGEST_PIECE_TOKENS
    while begin < tokens:
        while size > tokens - begin:
            size //= 2
        yield slice(begin, begin + size)
        begin += size
