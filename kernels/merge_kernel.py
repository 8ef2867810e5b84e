"""`kernels.merge.merge_partials` on a CUDA device, and the same for any number of parts: each is read once (Triton)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16


def merge_on_device(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """As `merge_partials`, which checks the arguments. Any strides, but neighbouring elements of a head are neighbours."""
    tokens, heads, head_dim = out_a.shape
    out = torch.empty(tokens, heads, head_dim, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=out_a.device)
    if out.numel() == 0:
        return out, lse
    out_a, out_b = (one if one.stride(2) == 1 else one.contiguous() for one in (out_a, out_b))
    _merge[(triton.cdiv(tokens * heads, _ROWS),)](
        out_a, lse_a, out_b, lse_b, out, lse, tokens * heads,
        out_a.stride(0), out_a.stride(1), lse_a.stride(0), lse_a.stride(1),
        out_b.stride(0), out_b.stride(1), lse_b.stride(0), lse_b.stride(1),
        HEADS=heads, HEAD_DIM=head_dim, BLOCK_DIM=triton.next_power_of_2(head_dim), ROWS=_ROWS, num_warps=4,
    )  # fmt: skip
    return out, lse


def merge_parts(parts: Tensor, lses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attention over disjoint sets of keys: parts [n, tokens, heads, head_dim] float32, lses [n, tokens, heads] float32.

    Both contiguous. Returns out [tokens, heads, head_dim] of `dtype` and lse; an empty part has lse -inf and finite out.
    """
    count, tokens, heads, head_dim = parts.shape
    out = torch.empty(tokens, heads, head_dim, dtype=dtype, device=parts.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=parts.device)
    if out.numel() == 0:
        return out, lse
    _merge_all[(triton.cdiv(tokens * heads, _ROWS),)](
        parts, lses, out, lse, tokens * heads, count,
        HEAD_DIM=head_dim, BLOCK_DIM=triton.next_power_of_2(head_dim), ROWS=_ROWS, num_warps=4,
    )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["rows", "count"])
def _merge_all(
    parts: tl.tensor,
    lses: tl.tensor,
    out: tl.tensor,
    out_lse: tl.tensor,
    rows: tl.tensor,
    count: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """ROWS pairs of a token and a head, over all parts."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    dims = tl.arange(0, BLOCK_DIM)
    wide = here[:, None] & (dims[None, :] < HEAD_DIM)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    for part in range(count):
        at = row + tl.cast(part, tl.int64) * rows
        lse = tl.load(lses + at, here, float("-inf"))
        found = tl.load(parts + at[:, None] * HEAD_DIM + dims[None, :], wide, 0.0)
        raised = tl.maximum(highest, lse)
        shift = tl.where(raised == float("-inf"), 0.0, raised)
        weight, shrink = tl.exp(lse - shift), tl.exp(highest - shift)
        sums = sums * shrink[:, None] + found * weight[:, None]
        total = total * shrink + weight
        highest = raised
    divisor = tl.where(total > 0.0, total, 1.0)
    tl.store(out + row[:, None] * HEAD_DIM + dims[None, :], (sums / divisor[:, None]).to(out.dtype.element_ty), wide)
    tl.store(out_lse + row, tl.where(total > 0.0, highest + tl.log(divisor), float("-inf")), here)


@triton.jit(do_not_specialize=["rows"])
def _merge(
    out_a: tl.tensor,
    lse_a: tl.tensor,
    out_b: tl.tensor,
    lse_b: tl.tensor,
    out: tl.tensor,
    out_lse: tl.tensor,
    rows: tl.tensor,
    token_a: tl.tensor,
    head_a: tl.tensor,
    lse_token_a: tl.tensor,
    lse_head_a: tl.tensor,
    token_b: tl.tensor,
    head_b: tl.tensor,
    lse_token_b: tl.tensor,
    lse_head_b: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """ROWS pairs of a token and a head."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // HEADS, row % HEADS
    here = row < rows
    dims = tl.arange(0, BLOCK_DIM)
    wide = here[:, None] & (dims[None, :] < HEAD_DIM)
    one = tl.load(lse_a + token * lse_token_a + head * lse_head_a, here, float("-inf"))
    other = tl.load(lse_b + token * lse_token_b + head * lse_head_b, here, float("-inf"))
    highest = tl.maximum(one, other)
    shift = tl.where(highest == float("-inf"), 0.0, highest)  # -inf - -inf would be NaN
    weight_a, weight_b = tl.exp(one - shift), tl.exp(other - shift)
    total = weight_a + weight_b
    scale = 1.0 / tl.where(total > 0.0, total, 1.0)
    part_a = tl.load(out_a + (token * token_a + head * head_a)[:, None] + dims[None, :], wide, 0.0).to(tl.float32)
    part_b = tl.load(out_b + (token * token_b + head * head_b)[:, None] + dims[None, :], wide, 0.0).to(tl.float32)
    mixed = part_a * (weight_a * scale)[:, None] + part_b * (weight_b * scale)[:, None]
    tl.store(out + row[:, None] * HEAD_DIM + dims[None, :], mixed.to(out.dtype.element_ty), wide)
    lse = tl.where(total > 0.0, shift + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    tl.store(out_lse + row, lse, here)
