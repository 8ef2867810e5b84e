"""Attention for serving on a CPU: a run of queries of one sequence, or one query each of many sequences.

Every variant returns (out, lse): out normalised over the keys it saw, lse float32, the natural log of the sum of
e^(scaled score). Results over disjoint keys meet in `kernels.merge.merge_partials`. Meaning: `kernels.reference`;
tolerance 1e-5 in float32, 1e-2 in bfloat16. No variant synchronises; results are new tensors.
"""

import torch
from torch import Tensor

from kernels.checks import require, require_same_device
from kernels.merge import merge_partials


def prefill_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last tokens of one sequence over all of its tokens.

    query       [tokens, heads, head_dim]      the last `tokens` positions
    key, value  [keys, kv_heads, head_dim]     positions 0 .. keys - 1 (or any run that ends with the queries);
                                               keys >= tokens, heads a multiple of kv_heads
    With a window a query at i sees only the keys at j with i - j < window_tokens.
    Returns out [tokens, heads, head_dim] and lse [tokens, heads].
    """
    _check_sequence(query, key, value)
    tokens, keys = query.shape[0], key.shape[0]
    require(keys >= tokens, "key", f"{keys} keys", f"at least the {tokens} of the queries themselves")
    if window_tokens is not None and window_tokens < keys:
        mask = _window_mask(tokens, keys, window_tokens, query)
        return _run_attention(query, key, value, scaling=scaling, mask=mask)
    prefix = keys - tokens
    own = _run_attention(query, key[prefix:], value[prefix:], scaling=scaling, causal=True)
    if prefix == 0:
        return own
    before = _run_attention(query, key[:prefix], value[:prefix], scaling=scaling)
    return merge_partials(*before, *own)


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, may_be_empty: bool = True
) -> tuple[Tensor, Tensor]:
    """Attention of one query per sequence over that sequence's keys, padded to a common number.

    query       [sequences, heads, head_dim]
    key, value  [sequences, keys, kv_heads, head_dim]; masked keys may be anything finite
    mask        [sequences, keys] in the query's dtype: 0 where a key is seen, -inf where not; None: all are seen
    Returns out [sequences, heads, head_dim] and lse [sequences, heads]. A sequence that sees no key: out 0, lse -inf;
    a caller that knows there is none says so with `may_be_empty` and saves two passes over the mask.

    The heads that share a kv head become the query length, so that each key is read once per sequence.
    """
    require(query.dim() == 3, "query", f"{query.dim()} dimensions", "[sequences, heads, head_dim]")
    require(key.dim() == 4, "key", f"{key.dim()} dimensions", "[sequences, keys, kv_heads, head_dim]")
    sequences, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1], key.shape[2]
    require(key.shape == (sequences, keys, kv_heads, head_dim), "key", tuple(key.shape), "query's sizes")
    require(value.shape == key.shape, "value", tuple(value.shape), f"key's shape {tuple(key.shape)}")
    require(heads % kv_heads == 0, "query", f"{heads} heads", f"a multiple of {kv_heads} kv heads")
    require_same_device(query, key=key, value=value)
    if mask is not None:
        require(mask.shape == (sequences, keys), "mask", tuple(mask.shape), f"{(sequences, keys)}")
        require_same_device(query, mask=mask)
    grouped = query.reshape(sequences, kv_heads, heads // kv_heads, head_dim)
    wide = None if mask is None else mask[:, None, None, :]
    out, lse = _attend(grouped, key.transpose(1, 2), value.transpose(1, 2), scaling=scaling, mask=wide)
    lse = lse.reshape(sequences, heads)
    if may_be_empty and mask is not None:  # the fused operator gives such rows an lse of 0
        lse = lse.masked_fill((mask.amax(dim=1) == float("-inf"))[:, None], float("-inf"))
    return out.reshape(sequences, heads, head_dim), lse


def _check_sequence(query: Tensor, key: Tensor, value: Tensor) -> None:
    require(query.dim() == 3, "query", f"{query.dim()} dimensions", "[tokens, heads, head_dim]")
    require(key.dim() == 3, "key", f"{key.dim()} dimensions", "[keys, kv_heads, head_dim]")
    require(key.shape[2] == query.shape[2], "key", f"head_dim {key.shape[2]}", f"query's {query.shape[2]}")
    require(value.shape == key.shape, "value", tuple(value.shape), f"key's shape {tuple(key.shape)}")
    heads, kv_heads = query.shape[1], key.shape[1]
    require(heads % kv_heads == 0, "query", f"{heads} heads", f"a multiple of {kv_heads} kv heads")
    require_same_device(query, key=key, value=value)


def _window_mask(tokens: int, keys: int, window_tokens: int, like: Tensor) -> Tensor:
    query_at = torch.arange(keys - tokens, keys, device=like.device)[:, None]
    key_at = torch.arange(keys, device=like.device)[None, :]
    hidden = (key_at > query_at) | (query_at - key_at >= window_tokens)
    return torch.zeros(tokens, keys, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))


def _run_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """[tokens, heads, head_dim] over [keys, kv_heads, head_dim]: kv heads become the batch, so that K is not copied."""
    tokens, heads, head_dim = query.shape
    keys, kv_heads = key.shape[0], key.shape[1]
    group = heads // kv_heads
    grouped = query.transpose(0, 1).reshape(kv_heads, group, tokens, head_dim)
    shared = (kv_heads, group, keys, head_dim)
    out, lse = _attend(
        grouped,
        key.transpose(0, 1)[:, None].expand(shared),
        value.transpose(0, 1)[:, None].expand(shared),
        scaling=scaling,
        mask=None if mask is None else mask[None, None],
        causal=causal,
    )
    out = out.reshape(heads, tokens, head_dim).transpose(0, 1)
    return out, lse.reshape(heads, tokens).transpose(0, 1)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention over [batch, heads, length, head_dim]; `causal` needs equal lengths. Returns out and lse."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scaling
    )
