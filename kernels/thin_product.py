"""The product of one row with a matrix, with what comes before and after it: for decode steps of one sequence (Triton).

Such a product reads the matrix once and does next to nothing with it: its time is that of the memory, and every kernel
beside it is paid in full. So a norm before it is computed again by each program, from a row that lies in the cache, and
the residual is added where the product is written. Rounding is as if each were an operator of its own (`kernels.norms`).
Against cuBLAS: benchmarks/gpu/operators.py. With two rows and more the library is as fast or faster.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import require, require_same_device
from kernels.early_start import early_start, wait_for_inputs

_BLOCK, _FEW_BLOCK, _DEEP = 8, 4, 512
_MANY_COLUMNS = 4096


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm of the row before the product, as `kernels.norms.rms_norm`."""

    weight: Tensor
    epsilon: float
    offset: float = 0.0


def thin_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """norm(x) weight^T + bias, and `residual` added in place if there is one.

    x         [1, n], contiguous; float32, bfloat16 or float16
    weight    [m, n], contiguous, of x's dtype; bias [m] or None
    residual  [1, m], contiguous: the product is rounded, added to it, and the sum, rounded, is written there
    Returns [1, m] in x's dtype: a new tensor, or `residual`. Sums are float32. Current stream, no synchronisation: may
    be captured. Raises KernelInputError.
    """
    m, n = weight.shape
    require(x.shape == (1, n) and x.is_contiguous(), "x", tuple(x.shape), f"contiguous {(1, n)}")
    require(weight.dtype == x.dtype and weight.is_contiguous(), "weight", weight.dtype, f"contiguous {x.dtype}")
    out = torch.empty(1, m, dtype=x.dtype, device=x.device) if residual is None else residual
    require(out.shape == (1, m) and out.is_contiguous(), "residual", tuple(out.shape), f"contiguous {(1, m)}")
    require_same_device(x, weight=weight, out=out)
    # Absent operands: a pointer that is never read.
    pointers = (x, weight, x if bias is None else bias, norm.weight if norm else x, out)
    epsilon, offset = (norm.epsilon, norm.offset) if norm else (0.0, 0.0)
    block = _BLOCK if m >= _MANY_COLUMNS else _FEW_BLOCK
    _one_row[(triton.cdiv(m, block),)](
        *pointers, m, n, epsilon, offset, BLOCK=block, DEEP=_DEEP, NORM=norm is not None, OFFSET=offset != 0.0,
        BIAS=bias is not None, ADD=residual is not None, num_warps=4, **early_start(x.device),
    )  # fmt: skip
    return out


@triton.jit
def _one_row(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    gain: tl.tensor,
    out: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    epsilon: tl.tensor,
    offset: tl.tensor,
    BLOCK: tl.constexpr,
    DEEP: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """BLOCK elements of the product."""
    dtype = x.dtype.element_ty
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.arange(0, DEEP)
    wait_for_inputs(EARLY)
    scale = 0.0
    if NORM:
        squares = tl.zeros([DEEP], tl.float32)
        for begin in range(0, n, DEEP):
            value = tl.load(x + begin + at, begin + at < n, 0.0).to(tl.float32)
            squares += value * value
        scale = tl.rsqrt(tl.sum(squares, axis=0) / n + epsilon)
    sums = tl.zeros([BLOCK, DEEP], tl.float32)
    lie = weight + column[:, None].to(tl.int64) * n
    for begin in range(0, n, DEEP):
        k = begin + at
        value = tl.load(x + k, k < n, 0.0).to(tl.float32)
        if NORM:
            factor = tl.load(gain + k, k < n, 0.0).to(tl.float32)
            value = value * scale
            if OFFSET:
                value = value * (factor + offset)
            else:
                value = value.to(dtype).to(tl.float32) * factor
            value = value.to(dtype).to(tl.float32)
        inside = (column[:, None] < m) & (k[None, :] < n)
        matrix = tl.load(lie + k[None, :], inside, 0.0, eviction_policy="evict_first").to(tl.float32)
        sums += matrix * value[None, :]
    total = tl.sum(sums, axis=1)
    inside = column < m
    if BIAS:
        total += tl.load(bias + column, inside, 0.0).to(tl.float32)
    if ADD:
        total = total.to(dtype).to(tl.float32) + tl.load(out + column, inside, 0.0).to(tl.float32)
    tl.store(out + column, total.to(dtype), inside)
