"""Attention by the fused kernels that torch brings for CUDA, over contiguous K and V; `kernels.prefill_choice` calls them.

Meaning as `kernels.reference`; tolerance 1e-2; bfloat16 and float16 only. New tensors, no synchronisation.
"""

import torch
from torch import Tensor

from kernels.kv_source import PagedKv


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

    cuDNN builds a plan for each new pair of lengths, which takes the host a while. Returns (out, lse).
    """
    batched = [one.transpose(0, 1)[None] for one in (query, key, value)]
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *batched, None, True, 0.0, causal, False, scale=scaling
    )
    return out[0].transpose(0, 1), lse.view(query.shape[1], query.shape[0]).transpose(0, 1)
