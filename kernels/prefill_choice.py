"""Which kernel computes a run of new queries: ours over the pages themselves, or cuDNN's over a copy of them.

A copy costs time that grows with the keys, attention time that grows with queries times keys: for long runs the copy is
lost in it, and cuDNN is the faster of the two there. But it makes a plan for each pair of lengths it has not met, so
it gets lengths of a coarse grain only: queries filled up with zeros, and a prefix in pieces of few sizes. The rates
below are from benchmarks/gpu/attention.py.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.fused_attention import cudnn_attention, gather_pages
from kernels.kv_source import PagedKv
from kernels.merge import merge_partials
from kernels.paged_prefill import Rules, Runs, prefill_into

_LIBRARY_DTYPES = (torch.bfloat16, torch.float16)
_LIBRARY_HEAD_DIMS = (64, 128)
_LEAST_QUERIES = 2048
_GRAIN_TOKENS = 1024
_LARGEST_PIECE_TOKENS = 32 * _GRAIN_TOKENS
_LIBRARY_SPEEDUP = 1.3
"""Rate of cuDNN over ours on long runs, less what copies and merging take."""
_WORTHWHILE = 0.95


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
    plain = window_tokens is None and soft_cap is None and _GRAIN_TOKENS % kv.block_tokens == 0
    rules = Rules(scaling=scaling, window_tokens=window_tokens, soft_cap=soft_cap)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    for stretch in _stretches(counts, [plain and pays_to_copy(query, *count) for count in counts]):
        first, last = stretch.sequences.start, stretch.sequences.stop
        own = PagedKv(kv.pages, kv.table[first:last], kv.page_shift)
        runs = Runs(query_starts[first : last + 1], lengths[first:last], max(queries for queries, _ in stretch.counts))
        if stretch.is_long:
            _run_over_copy((out, lse), query, own, runs, stretch, rules)
        else:
            prefill_into((out, lse), query, own, runs, rules)
    return out


def pays_to_copy(query: Tensor, queries: int, keys: int) -> bool:
    """Whether cuDNN over a copy of the keys is well faster than our kernel over the pages."""
    if query.dtype not in _LIBRARY_DTYPES or query.shape[2] not in _LIBRARY_HEAD_DIMS or queries < _LEAST_QUERIES:
        return False
    before = keys - queries
    prefix, filled_up = _whole_grains(before), _filled_up(queries)
    ours = queries * (before + queries / 2)
    if prefix == before:
        theirs = filled_up * (before + filled_up / 2) / _LIBRARY_SPEEDUP
    else:
        theirs = queries * (before - prefix + queries / 2) + filled_up * prefix / _LIBRARY_SPEEDUP
    return theirs < _WORTHWHILE * ours


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Neighbouring sequences that one way computes; a long one is alone."""

    sequences: slice
    rows: slice
    counts: tuple[tuple[int, int], ...]
    is_long: bool


def _stretches(counts: Sequence[tuple[int, int]], long: Sequence[bool]) -> Iterator[_Stretch]:
    first = row = 0
    for is_long, group in itertools.groupby(range(len(counts)), long.__getitem__):
        members = list(group)
        for some in ([one] for one in members) if is_long else (members,):
            own = tuple(counts[one] for one in some)
            end = row + sum(queries for queries, _ in own)
            yield _Stretch(slice(first, first + len(some)), slice(row, end), own, is_long)
            first, row = first + len(some), end


def _run_over_copy(
    results: tuple[Tensor, Tensor], query: Tensor, kv: PagedKv, runs: Runs, stretch: _Stretch, rules: Rules
) -> None:
    """The prefix in whole grains by cuDNN; what follows too if it is the queries' own keys, or else over the pages."""
    ((queries, keys),) = stretch.counts
    prefix, room = _whole_grains(keys - queries), _filled_up(queries)
    mine = query[stretch.rows]
    filled = torch.cat([mine, mine.new_zeros(room - queries, *mine.shape[1:])]) if room > queries else mine
    if prefix == keys - queries:
        key, value = gather_pages(kv, 0, keys, prefix + room)
        found = cudnn_attention(filled, key[prefix:], value[prefix:], scaling=rules.scaling, causal=True)
    else:
        key, value = gather_pages(kv, 0, prefix)
        after = PagedKv(kv.pages, kv.table[:, prefix // kv.block_tokens :], kv.page_shift)
        prefill_into(results, query, after, Runs(runs.query_starts, runs.lengths - prefix, queries), rules)
        found = results[0][stretch.rows], results[1][stretch.rows]
    found = found[0][:queries], found[1][:queries]
    for piece in _pieces(prefix):
        part = cudnn_attention(filled, key[piece], value[piece], scaling=rules.scaling, causal=False)
        found = merge_partials(*found, part[0][:queries], part[1][:queries])
    results[0][stretch.rows] = found[0]


def _whole_grains(tokens: int) -> int:
    return tokens // _GRAIN_TOKENS * _GRAIN_TOKENS


def _filled_up(tokens: int) -> int:
    return -(-tokens // _GRAIN_TOKENS) * _GRAIN_TOKENS


def _pieces(tokens: int) -> Iterator[slice]:
    """Powers of two of grains, the largest first."""
    begin = 0
    size = _LARGEST_PIECE_TOKENS
    while begin < tokens:
        while size > tokens - begin:
            size //= 2
        yield slice(begin, begin + size)
        begin += size
