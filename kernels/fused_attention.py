"""Attention by the fused kernels that torch brings for CUDA, over contiguous K and V; `kernels.prefill_choice` calls them.

Meaning as `kernels.reference`; tolerance 1e-2; bfloat16 and float16 only. New tensors, no synchronisation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.kv_source import PagedKv


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs of queries of several sequences, known on the host and on the device."""

    query_starts: Tensor
    """int32 [sequences + 1]."""
    lengths: Tensor
    """int32 [sequences]: keys of each, those of the queries included."""
    counts: tuple[tuple[int, int], ...]
    """(queries, keys) of each sequence, as the tensors say."""

    @property
    def max_queries(self) -> int:
        """Of the longest run."""
        return max(queries for queries, _ in self.counts)

    @property
    def max_keys(self) -> int:
        """Of the longest sequence."""
        return max(keys for _, keys in self.counts)


def gather_pages(kv: PagedKv, sequence: int, keys: int) -> tuple[Tensor, Tensor]:
    """Copies of the first `keys` keys and values of one sequence, [keys, kv_heads, head_dim] each."""
    blocks = -(-keys // kv.block_tokens)
    halves = kv.pages.view(2 * kv.pages.shape[0], kv.block_tokens * kv.token_elements)
    first = 2 * (kv.table[sequence, :blocks] + kv.page_shift)
    shape = (blocks * kv.block_tokens, kv.kv_heads, kv.head_dim)
    return (
        halves.index_select(0, first).view(shape)[:keys],
        halves.index_select(0, first + 1).view(shape)[:keys],
    )


def cudnn_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """[tokens, heads, head_dim] over [keys, kv_heads, head_dim]; `causal` needs as many queries as keys.

    cuDNN builds a plan for each new pair of lengths, which costs milliseconds on the host. Returns (out, lse).
    """
    batched = [one.transpose(0, 1)[None] for one in (query, key, value)]
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *batched, None, True, 0.0, causal, False, scale=scaling
    )
    return out[0].transpose(0, 1), lse.view(query.shape[1], query.shape[0]).transpose(0, 1)


def flash_runs(
    query: Tensor, key: Tensor, value: Tensor, runs: Runs, *, scaling: float, window_tokens: int | None = None
) -> Tensor:
    """All runs in one call: query [tokens, heads, head_dim], key and value [all keys, kv_heads, head_dim], in order."""
    key_starts = torch.nn.functional.pad(runs.lengths.cumsum(0, dtype=torch.int32), (1, 0))
    out, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, runs.query_starts, key_starts, runs.max_queries, runs.max_keys, 0.0, True, False,
        scale=scaling, window_size_left=None if window_tokens is None else window_tokens - 1,
        window_size_right=None if window_tokens is None else 0,
    )  # fmt: skip
    return out
