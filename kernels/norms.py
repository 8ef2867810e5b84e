"""Root-mean-square normalisation, alone or after adding to the residual stream (Triton).

One program holds one row. Sums are float32; where results are rounded to the dtype is what the layers of transformers
do (LlamaRMSNorm, Gemma3RMSNorm), so that tokens agree in 16 bits too. Meaning: `kernels.reference_ops`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import require, require_same_device

_LONGEST_ROW = 65536


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * (weight + offset), row by row.

    x       [rows, n], elements of a row contiguous; float32, bfloat16 or float16; may have no rows
    weight  [n], contiguous
    offset 0: the normalised value is rounded to x's dtype before the product with the weight. Any other offset (gemma:
    1): weight and product are float32 and rounded once, at the end.
    Returns a new tensor of x's shape and dtype. Current stream, no synchronisation. Raises KernelInputError.
    """
    _check(x, weight)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, normed, epsilon, offset)
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, *, offset: float = 0.0) -> Tensor:
    """Adds x to `residual` in place, rounded to its dtype, and returns `rms_norm` of the sum as a new tensor.

    residual  [rows, n], of x's dtype, elements of a row contiguous; must not share memory with x
    Everything else is as for `rms_norm`.
    """
    _check(x, weight)
    require(residual.shape == x.shape, "residual", tuple(residual.shape), f"x's shape {tuple(x.shape)}")
    require(residual.dtype == x.dtype, "residual", residual.dtype, f"x's {x.dtype}")
    require(residual.stride(1) == 1, "residual", f"strides {residual.stride()}", "rows of contiguous elements")
    require_same_device(x, residual=residual)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, residual, weight, normed, epsilon, offset)
    return normed


def _check(x: Tensor, weight: Tensor) -> None:
    require(x.dim() == 2, "x", tuple(x.shape), "[rows, n]")
    require(x.is_floating_point() and x.element_size() <= 4, "x", x.dtype, "float32, bfloat16 or float16")
    require(x.stride(1) == 1, "x", f"strides {x.stride()}", "rows of contiguous elements")
    require(0 < x.shape[1] <= _LONGEST_ROW, "x", f"rows of {x.shape[1]}", f"1 to {_LONGEST_ROW} elements")
    require(weight.shape == x.shape[1:], "weight", tuple(weight.shape), f"[{x.shape[1]}]")
    require(weight.is_contiguous(), "weight", f"strides {weight.stride()}", "a contiguous tensor")
    require_same_device(x, weight=weight)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, normed: Tensor, epsilon: float, offset: float) -> None:
    rows, length = x.shape
    if rows == 0:
        return
    block = triton.next_power_of_2(length)
    stream = x if residual is None else residual
    _norm_rows[(rows,)](
        x, stream, weight, normed, length, x.stride(0), stream.stride(0), epsilon, offset,
        ADD=residual is not None, OFFSET=offset != 0.0, BLOCK=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip


@triton.jit
def _norm_rows(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    normed: tl.tensor,
    length: int,
    x_stride: int,
    residual_stride: int,
    epsilon: float,
    offset: float,
    ADD: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < length
    dtype = normed.dtype.element_ty
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        place = residual + row * residual_stride + at
        value += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        value = value.to(dtype).to(tl.float32)
        tl.store(place, value.to(dtype), mask=inside)
    value = value * tl.rsqrt(tl.sum(value * value, axis=0) / length + epsilon)
    if OFFSET:
        value = value * (gain + offset)
    else:
        value = value.to(dtype).to(tl.float32) * gain
    tl.store(normed + row * length + at, value.to(dtype), mask=inside)
