"""Rotary positions of query and key, their per-head norms, and K and V into their pages: one launch a layer (Triton).

A program takes some heads of one token. Rotation pairs element d with d + head_dim / 2, as transformers does, and
rounds to the dtype after every product and sum, as its operators do. Meaning: `kernels.reference_ops`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import require, require_same_device

_FEW_TOKENS = 256


def rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    pages: Tensor,
    slots: Tensor,
    *,
    heads: int,
    page_shift: int = 0,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    epsilon: float = 1e-6,
    offset: float = 0.0,
) -> Tensor:
    """Rotates queries and keys, writes keys and values into pages, returns the queries [tokens, heads, head_dim].

    qkv       [tokens, (heads + 2 * kv_heads) * head_dim]: a token's queries, keys, values; elements of a row contiguous
    cos, sin  [tokens, head_dim], contiguous; rounded to qkv's dtype if they are of another
    pages     [pages, block_tokens, 2, kv_heads, head_dim], contiguous but for the first dimension; K and V are rounded
              to its dtype. Written in place; pages that no slot names stay
    slots     int64 [tokens]: page * block_tokens + place within it, no two the same; below 0: written nowhere. Of a page
              that a slot names, `page_shift` pages further is written: the layer, where layers are neighbours
    query_norm and key_norm, both or neither, are weights [head_dim] of a norm of every head before its rotation
    (`kernels.norms.rms_norm`, with `epsilon` and `offset`).
    New tensor, current stream, no synchronisation: may be captured. Slots are not checked against the number of pages.
    Raises KernelInputError.
    """
    _check(qkv, cos, sin, pages, slots)
    _, block_tokens, _, kv_heads, head_dim = pages.shape
    width = (heads + 2 * kv_heads) * head_dim
    require(heads > 0 and qkv.shape[1] == width, "qkv", f"rows of {qkv.shape[1]}", f"{width} for {heads} heads")
    require((query_norm is None) == (key_norm is None), "key_norm", "one norm without the other", "both or neither")
    for name, norm in (("query_norm", query_norm), ("key_norm", key_norm)):
        if norm is not None:
            require(norm.shape == (head_dim,) and norm.is_contiguous(), name, tuple(norm.shape), f"[{head_dim}]")
            require_same_device(qkv, **{name: norm})
    tokens = qkv.shape[0]
    query = torch.empty(tokens, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return query
    at_once = min(triton.next_power_of_2(heads + 2 * kv_heads), 4 if tokens <= _FEW_TOKENS else 16)
    half_block = triton.next_power_of_2(head_dim // 2)
    _rotate[(tokens, triton.cdiv(heads + 2 * kv_heads, at_once))](
        qkv, cos, sin, query, pages, slots,
        cos if query_norm is None else query_norm, cos if key_norm is None else key_norm,
        qkv.stride(0), pages.stride(0), page_shift, epsilon, offset,
        HEADS=heads, KV_HEADS=kv_heads, BLOCK_TOKENS=block_tokens, HALF=head_dim // 2,
        NORM=query_norm is not None, OFFSET=offset != 0.0, AT_ONCE=at_once, HALF_BLOCK=half_block,
        num_warps=max(1, min(4, at_once * half_block // 256)),
        enable_fp_fusion=False,  # or 16-bit products are fused with their sum and lose their rounding
    )  # fmt: skip
    return query


def _check(qkv: Tensor, cos: Tensor, sin: Tensor, pages: Tensor, slots: Tensor) -> None:
    require(pages.dim() == 5 and pages.shape[2] == 2, "pages", tuple(pages.shape), "[pages, block, 2, kv_heads, dim]")
    head_dim = pages.shape[4]
    require(pages[:1].is_contiguous(), "pages", f"strides {pages.stride()}", "contiguous pages")
    require(head_dim % 2 == 0, "pages", f"head_dim {head_dim}", "an even one")
    require(qkv.dim() == 2, "qkv", tuple(qkv.shape), "[tokens, (heads + 2 * kv_heads) * head_dim]")
    require(qkv.stride(1) == 1, "qkv", f"strides {qkv.stride()}", "rows of contiguous elements")
    expected = (qkv.shape[0], head_dim)
    for name, angle in (("cos", cos), ("sin", sin)):
        require(angle.shape == expected and angle.is_contiguous(), name, tuple(angle.shape), f"contiguous {expected}")
    require(slots.shape == qkv.shape[:1], "slots", tuple(slots.shape), f"[{qkv.shape[0]}]")
    require(slots.dtype == torch.int64, "slots", slots.dtype, "int64")
    require(slots.is_contiguous(), "slots", f"strides {slots.stride()}", "contiguous")
    require_same_device(qkv, cos=cos, sin=sin, pages=pages, slots=slots)


@triton.jit(do_not_specialize=["page_shift"])  # another one in every layer
def _rotate(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    query: tl.tensor,
    pages: tl.tensor,
    slots: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    qkv_stride: int,
    page_stride: int,
    page_shift: int,
    epsilon: float,
    offset: float,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)[:, None]
    at = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < HEADS + 2 * KV_HEADS) & (at < HALF)
    dtype = query.dtype.element_ty
    source = qkv + token * qkv_stride + head * (2 * HALF) + at
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    is_query = head < HEADS
    is_value = head >= HEADS + KV_HEADS
    turned_low, turned_high = low, high
    if NORM:
        turned_low, turned_high = _norm_heads(
            low, high, is_query, at, query_norm, key_norm, epsilon, offset, HALF, OFFSET, dtype
        )
    turned_low, turned_high = _turn(turned_low, turned_high, cos + token * (2 * HALF), sin + token * (2 * HALF),
                                    at, HALF, dtype)  # fmt: skip
    low = tl.where(is_value, low, turned_low)
    high = tl.where(is_value, high, turned_high)
    out = query + (token * HEADS + head) * (2 * HALF) + at
    tl.store(out, low.to(dtype), mask=inside & is_query)
    tl.store(out + HALF, high.to(dtype), mask=inside & is_query)
    slot = tl.load(slots + token)
    place = slot % BLOCK_TOKENS * (2 * KV_HEADS) + head - HEADS  # a token's V heads follow its K heads, as in qkv
    kept = pages + (slot // BLOCK_TOKENS + page_shift) * page_stride + place * (2 * HALF) + at
    written = inside & (head >= HEADS) & (slot >= 0)
    tl.store(kept, low.to(pages.dtype.element_ty), mask=written)
    tl.store(kept + HALF, high.to(pages.dtype.element_ty), mask=written)


@triton.jit
def _norm_heads(
    low: tl.tensor,
    high: tl.tensor,
    is_query: tl.tensor,
    at: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    epsilon: float,
    offset: float,
    HALF: tl.constexpr,
    OFFSET: tl.constexpr,
    dtype: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves of every head, normalised together."""
    inside = at < HALF
    gain_low = tl.where(
        is_query, tl.load(query_norm + at, mask=inside, other=0.0), tl.load(key_norm + at, mask=inside, other=0.0)
    ).to(tl.float32)
    gain_high = tl.where(
        is_query,
        tl.load(query_norm + HALF + at, mask=inside, other=0.0),
        tl.load(key_norm + HALF + at, mask=inside, other=0.0),
    ).to(tl.float32)
    squares = tl.sum(low * low + high * high, axis=1)[:, None]
    scale = tl.rsqrt(squares / (2 * HALF) + epsilon)
    if OFFSET:
        return (
            (low * scale * (gain_low + offset)).to(dtype).to(tl.float32),
            (high * scale * (gain_high + offset)).to(dtype).to(tl.float32),
        )
    else:
        return (
            ((low * scale).to(dtype).to(tl.float32) * gain_low).to(dtype).to(tl.float32),
            ((high * scale).to(dtype).to(tl.float32) * gain_high).to(dtype).to(tl.float32),
        )


@triton.jit
def _turn(
    low: tl.tensor,
    high: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    at: tl.tensor,
    HALF: tl.constexpr,
    dtype: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """low * cos - high * sin and high * cos + low * sin, every product and sum rounded to the dtype."""
    inside = at < HALF
    cos_low = tl.load(cos + at, mask=inside, other=0.0).to(dtype).to(tl.float32)
    cos_high = tl.load(cos + HALF + at, mask=inside, other=0.0).to(dtype).to(tl.float32)
    sin_low = tl.load(sin + at, mask=inside, other=0.0).to(dtype).to(tl.float32)
    sin_high = tl.load(sin + HALF + at, mask=inside, other=0.0).to(dtype).to(tl.float32)
    turned_low = (low * cos_low).to(dtype).to(tl.float32) - (high * sin_low).to(dtype).to(tl.float32)
    turned_high = (high * cos_high).to(dtype).to(tl.float32) + (low * sin_high).to(dtype).to(tl.float32)
    return turned_low.to(dtype).to(tl.float32), turned_high.to(dtype).to(tl.float32)
