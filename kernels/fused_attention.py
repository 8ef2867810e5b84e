"""Attention by cuDNN over contiguous K and V, and the copies of pages that it needs; `kernels.prefill_choice` calls them.

Meaning as `kernels.reference`; tolerance 1e-2; bfloat16 and float16 only. New tensors, no synchronisation.
"""

import torch
from torch import Tensor

from kernels.kv_source import PagedKv


def copied_keys_values(kv: PagedKv, sequence: int, keys: int, room: int | None = None) -> tuple[Tensor, Tensor]:
    """The first `keys` keys and values of one sequence, [room or keys, kv_heads, head_dim] each: views of one copy.

    Places from `keys` on are 0.
    """
    blocks = -(-keys // kv.block_tokens)
    room = keys if room is None else room
    rows = max(room, blocks * kv.block_tokens)
    pages = kv.pages.view(kv.pages.shape[0], kv.page_elements)
    copy = pages.new_empty(rows, 2, kv.kv_heads, kv.head_dim)
    written = copy[: blocks * kv.block_tokens].view(blocks, kv.page_elements)
    torch.index_select(pages, 0, kv.table[sequence, :blocks] + kv.page_shift, out=written)
    copy[keys:].zero_()
    key, value = copy[:room].unbind(1)
    return key, value


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
