"""Which kernel computes a run of new queries: ours over the pages themselves, or one of torch's over a copy of them.

A copy costs time that grows with the keys, attention time that grows with queries times keys: for long runs the copy is
lost in it, and the library's kernel may be the faster one. The limits below are from benchmarks/gpu/attention.py.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.fused_attention import cudnn_attention, gather_pages
from kernels.kv_source import PagedKv
from kernels.merge import merge_partials
from kernels.paged_prefill import Rules, Runs, prefill_into

_LIBRARY_DTYPES = (torch.bfloat16, torch.float16)
_LIBRARY_HEAD_DIMS = (64, 128)
_LEAST_QUERIES = 2048
_GRAIN_TOKENS = 512
"""cuDNN makes a plan for each pair of lengths that it has not met, so only few pairs may reach it."""


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
    plain = window_tokens is None and soft_cap is None
    rules = Rules(scaling=scaling, window_tokens=window_tokens, soft_cap=soft_cap)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    first = row = 0
    for copies, stretch in itertools.groupby(counts, lambda count: plain and pays_to_copy(query, *count)):
        members = list(stretch)
        last = first + len(members)
        own = PagedKv(kv.pages, kv.table[first:last], kv.page_shift)
        if copies:
            for sequence, (queries, keys) in enumerate(members):
                copied = gather_pages(own, sequence, keys)
                out[row : row + queries] = attention_over_copy(query[row : row + queries], *copied, scaling=scaling)
                row += queries
        else:
            most = max(queries for queries, _ in members)
            runs = Runs(query_starts[first : last + 1], lengths[first:last], most)
            prefill_into((out, lse), query, own, runs, rules)
            row += sum(queries for queries, _ in members)
        first = last
    return out


def attention_over_copy(query: Tensor, key: Tensor, value: Tensor, *, scaling: float) -> Tensor:
    """Causal attention of the last tokens of one sequence by cuDNN: the prefix whole, the queries' own keys causally."""
    before = key.shape[0] - query.shape[0]
    own = cudnn_attention(query, key[before:], value[before:], scaling=scaling, causal=True)
    if before == 0:
        return own[0]
    prefix = cudnn_attention(query, key[:before], value[:before], scaling=scaling, causal=False)
    return merge_partials(*prefix, *own)[0]


def pays_to_copy(query: Tensor, queries: int, keys: int) -> bool:
    """Whether torch's kernel over a copy of the keys beats ours over the pages."""
    return (
        query.dtype in _LIBRARY_DTYPES
        and query.shape[2] in _LIBRARY_HEAD_DIMS
        and queries >= _LEAST_QUERIES
        and queries % _GRAIN_TOKENS == 0
        and keys % _GRAIN_TOKENS == 0
    )
