"""Products of a few rows with a matrix, with what comes before and after them: for decode steps of small batches (Triton).

Such a product reads the matrix once and does next to nothing with it: its time is that of the memory, and every kernel
beside it is paid in full. So the norm or the gate before the product is computed again by each program, from rows that
lie in the cache, and the residual is added where the product is written. Rounding is as if each were an operator of its
own (`kernels.norms`, `kernels.activation`). Against cuBLAS: benchmarks/gpu/operators.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.activation import GateKind
from kernels.checks import require, require_same_device
from kernels.early_start import early_start, wait_for_inputs
from kernels.tiles import dot_constants

MOST_ROWS = 8
_PLAIN, _NORM, _SILU, _GELU = 0, 1, 2, 3
_GATES = {"silu": _SILU, "gelu_tanh": _GELU}


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm of the rows before the product, as `kernels.norms.rms_norm`."""

    weight: Tensor
    epsilon: float
    offset: float = 0.0


def thin_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    before: Norm | GateKind | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """before(x) weight^T + bias, and `residual` added in place if there is one.

    x         [rows, n], 1 to MOST_ROWS rows, contiguous; with a gate [rows, 2 * n]: the gates, then the ups
    weight    [m, n], contiguous, of x's dtype; bias [m] or None
    residual  [rows, m], contiguous: the product is rounded, added to it, and the sum, rounded, is written there
    Returns [rows, m] in x's dtype: a new tensor, or `residual`. Sums are float32. Current stream, no synchronisation:
    may be captured. Raises KernelInputError.
    """
    rows, width = x.shape
    m, n = weight.shape
    gate = isinstance(before, str)
    require(1 <= rows <= MOST_ROWS, "x", f"{rows} rows", f"1 to {MOST_ROWS}")
    require(width == (2 * n if gate else n) and x.is_contiguous(), "x", tuple(x.shape), f"contiguous rows for {n}")
    require(weight.dtype == x.dtype and weight.is_contiguous(), "weight", weight.dtype, f"contiguous {x.dtype}")
    out = torch.empty(rows, m, dtype=x.dtype, device=x.device) if residual is None else residual
    require(out.shape == (rows, m) and out.is_contiguous(), "residual", tuple(out.shape), f"contiguous {(rows, m)}")
    require_same_device(x, weight=weight, out=out)
    norm = before if isinstance(before, Norm) else None
    constants = {
        "BEFORE": _NORM if norm else _GATES[before] if isinstance(before, str) else _PLAIN,
        "OFFSET": norm is not None and norm.offset != 0.0,
        "BIAS": bias is not None,
        "ADD": residual is not None,
        **early_start(x.device),
    }
    # Absent operands: a pointer that is never read.
    pointers = (x, weight, x if bias is None else bias, norm.weight if norm else x, out)
    epsilon, offset = (norm.epsilon, norm.offset) if norm else (0.0, 0.0)
    if rows == 1:
        block = 8 if m >= 4096 else 4
        _one_row[(triton.cdiv(m, block),)](
            *pointers, m, n, epsilon, offset, BLOCK=block, DEEP=512, num_warps=4, num_stages=3, **constants
        )
    else:
        _some_rows[(triton.cdiv(m, 32),)](
            *pointers, rows, m, n, epsilon, offset, ROWS=16, BLOCK=32, DEEP=256 if x.element_size() == 2 else 64,
            num_warps=4, num_stages=4, **dot_constants(x), **constants,
        )  # fmt: skip
    return out


@triton.jit
def _scale(
    x: tl.tensor,
    row: tl.tensor,
    seen: tl.tensor,
    n: tl.tensor,
    epsilon: tl.tensor,
    ROWS: tl.constexpr,
    DEEP: tl.constexpr,
) -> tl.tensor:
    """1 / root mean square of each row [ROWS]."""
    at = tl.arange(0, DEEP)
    squares = tl.zeros([ROWS, DEEP], tl.float32)
    for begin in range(0, n, DEEP):
        k = begin + at
        value = tl.load(x + row[:, None] * n + k[None, :], seen[:, None] & (k[None, :] < n), 0.0).to(tl.float32)
        squares += value * value
    return tl.rsqrt(tl.sum(squares, axis=1) / n + epsilon)


@triton.jit
def _prepared(
    x: tl.tensor,
    gain: tl.tensor,
    row: tl.tensor,
    seen: tl.tensor,
    k: tl.tensor,
    n: tl.tensor,
    scale: tl.tensor,
    offset: tl.tensor,
    BEFORE: tl.constexpr,
    OFFSET: tl.constexpr,
) -> tl.tensor:
    """Elements k of the rows as they enter the product, [ROWS, DEEP] float32, rounded to x's dtype."""
    dtype = x.dtype.element_ty
    inside = seen[:, None] & (k[None, :] < n)
    if BEFORE >= 2:
        at = x + row[:, None] * (2 * n) + k[None, :]
        gate = tl.load(at, inside, 0.0).to(tl.float32)
        up = tl.load(at + n, inside, 0.0).to(tl.float32)
        if BEFORE == 3:
            slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
            active = 0.5 * gate * (1.0 + (2.0 / (1.0 + tl.exp(-slope)) - 1.0))
        else:
            active = gate / (1.0 + tl.exp(-gate))
        value = (active.to(dtype).to(tl.float32) * up).to(dtype).to(tl.float32)
    else:
        value = tl.load(x + row[:, None] * n + k[None, :], inside, 0.0).to(tl.float32)
        if BEFORE == 1:
            weight = tl.load(gain + k, k < n, 0.0).to(tl.float32)[None, :]
            value = value * scale[:, None]
            if OFFSET:
                value = value * (weight + offset)
            else:
                value = value.to(dtype).to(tl.float32) * weight
            value = value.to(dtype).to(tl.float32)
    return value


@triton.jit
def _finish(
    sums: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
    m: tl.tensor,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    """Write sums [ROWS, BLOCK]."""
    dtype = out.dtype.element_ty
    if BIAS:
        sums += tl.load(bias + column, column < m, 0.0).to(tl.float32)[None, :]
    place = out + row[:, None] * m + column[None, :]
    if ADD:
        sums = sums.to(dtype).to(tl.float32) + tl.load(place, inside, 0.0).to(tl.float32)
    tl.store(place, sums.to(dtype), inside)


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
    BEFORE: tl.constexpr,
    OFFSET: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """BLOCK elements of the product with one row."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.arange(0, DEEP)
    row = tl.zeros([1], tl.int32)
    seen = row == 0
    wait_for_inputs(EARLY)
    scale = tl.zeros([1], tl.float32)
    if BEFORE == 1:
        scale = _scale(x, row, seen, n, epsilon, 1, DEEP)
    sums = tl.zeros([BLOCK, DEEP], tl.float32)
    lie = weight + column[:, None].to(tl.int64) * n
    for begin in range(0, n, DEEP):
        k = begin + at
        value = _prepared(x, gain, row, seen, k, n, scale, offset, BEFORE, OFFSET)
        inside = (column[:, None] < m) & (k[None, :] < n)
        sums += tl.load(lie + k[None, :], inside, 0.0, eviction_policy="evict_first").to(tl.float32) * value
    total = tl.sum(sums, axis=1)[None, :]
    _finish(total, bias, out, row, column, column[None, :] < m, m, BIAS, ADD)


@triton.jit
def _some_rows(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    gain: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    epsilon: tl.tensor,
    offset: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEEP: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BEFORE: tl.constexpr,
    OFFSET: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """BLOCK columns of the product with all rows."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.arange(0, DEEP)
    row = tl.arange(0, ROWS)
    seen = row < rows
    wait_for_inputs(EARLY)
    scale = tl.zeros([ROWS], tl.float32)
    if BEFORE == 1:
        scale = _scale(x, row, seen, n, epsilon, ROWS, DEEP)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    lie = weight + column[:, None].to(tl.int64) * n
    for begin in range(0, n, DEEP):
        k = begin + at
        value = _prepared(x, gain, row, seen, k, n, scale, offset, BEFORE, OFFSET).to(DOT)
        inside = (column[:, None] < m) & (k[None, :] < n)
        matrix = tl.load(lie + k[None, :], inside, 0.0, eviction_policy="evict_first").to(DOT)
        sums = tl.dot(value, tl.trans(matrix), sums, input_precision=PRECISION)
    _finish(sums, bias, out, row, column, seen[:, None] & (column[None, :] < m), m, BIAS, ADD)
