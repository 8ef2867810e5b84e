"""Attention by cuDNN over contiguous K and V, and the copies of pages that it needs; `kernels.prefill_choice` calls them.

Meaning as `kernels.reference`; tolerance 1e-2; bfloat16 and float16 only. New tensors, no synchronisation.
"""

import torch
from torch import Tensor

from kernels.kv_source import PagedKv


def copied_keys_values(kv: PagedKv, sequence: int, keys: int, room: int | None = None) -> tuple[Tensor, Tensor]:
    """Copies of the first `keys` keys and values of one sequence, [room or keys, kv_heads, head_dim] each.

    Places from `keys` on are 0.
    """
    blocks = -(-keys // kv.block_tokens)
    room = keys if room is None else room
    rows = max(room, blocks * kv.block_tokens)
    halves = kv.pages.view(2 * kv.pages.shape[0], kv.block_tokens * kv.token_elements)
    first = 2 * (kv.table[sequence, :blocks] + kv.page_shift)
    key, value = (halves.new_empty(rows, kv.kv_heads, kv.head_dim) for _ in range(2))
    for side, copy in enumerate((key, value)):
        written = copy[: blocks * kv.block_tokens].view(blocks, halves.shape[1])
        torch.index_select(halves, 0, first + side, out=written)
        copy[keys:].zero_()
    return key[:room], value[:room]


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
