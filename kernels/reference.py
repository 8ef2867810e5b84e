"""What the kernels mean, in plain torch and float64. Slow; tests compare every implementation with this file."""

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    offset: int,
    scaling: float,
    window_tokens: int | None = None,
    strict: bool = False,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of a run of queries over a run of keys of one sequence.

    query       [tokens, heads, head_dim], at positions offset, offset + 1, ... counted from the first key's
    key, value  [keys, kv_heads, head_dim], at positions 0, 1, ...; heads share kv_heads in order
    A query at position i sees keys at positions j <= i, and with a window only those with i - j < window_tokens;
    `strict` hides j = i as well. soft_cap c turns a scaled score s into c * tanh(s / c).
    Returns out [tokens, heads, head_dim] in the query's dtype and lse [tokens, heads] float32, the natural log of
    the sum of e^(scaled score). A query that sees no key has out = 0 and lse = -inf.
    """
    tokens, heads, _ = query.shape
    keys, kv_heads, _ = key.shape
    group = heads // kv_heads
    wide_key = key.double().repeat_interleave(group, dim=1)
    wide_value = value.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("thd,shd->hts", query.double(), wide_key) * scaling
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    query_at = torch.arange(offset, offset + tokens, device=query.device)[:, None]
    key_at = torch.arange(keys, device=query.device)[None, :]
    seen = key_at < query_at if strict else key_at <= query_at
    if window_tokens is not None:
        seen = seen & (query_at - key_at < window_tokens)
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse[..., None]).nan_to_num(0.0)
    out = torch.einsum("hts,shd->thd", weights, wide_value)
    return out.to(query.dtype), lse.transpose(0, 1).float()


def merge_partials(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from its results over each; shapes as `attention` returns them."""
    lse = torch.logaddexp(lse_a.double(), lse_b.double())
    weight_a = torch.exp(lse_a.double() - lse).nan_to_num(0.0)
    weight_b = torch.exp(lse_b.double() - lse).nan_to_num(0.0)
    out = out_a.double() * weight_a[..., None] + out_b.double() * weight_b[..., None]
    return out.to(out_a.dtype), lse.float()


def gather_tokens(pages: Tensor, page_ids: list[int], tokens: int) -> tuple[Tensor, Tensor]:
    """K and V [tokens, kv_heads, head_dim] of the first `tokens` tokens held by the pages of one layer, in order."""
    chosen = pages[torch.tensor(page_ids, dtype=torch.int64)]
    keys = chosen[:, :, 0].flatten(0, 1)
    values = chosen[:, :, 1].flatten(0, 1)
    return keys[:tokens], values[:tokens]
