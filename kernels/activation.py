"""The gate of a feed-forward layer: activation of one half times the other (Triton).

Meaning: `kernels.reference_ops`. The activation is computed in float32 and rounded to the dtype before the product, as
the MLP layers of transformers do.
"""

from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import require

GateKind = Literal["silu", "gelu_tanh"]
"""silu(x) = x * sigmoid(x); gelu_tanh is GELU with tanh in the place of the error function."""

_BLOCK = 1024


def gated(gate_up: Tensor, *, kind: GateKind = "silu") -> Tensor:
    """activation(gate) * up.

    gate_up  [tokens, 2 * n], elements of a row contiguous: the gates, then the ups; float32, bfloat16 or float16
    Returns a new tensor [tokens, n] of its dtype. Current stream, no synchronisation. Raises KernelInputError.
    """
    require(gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0, "gate_up", tuple(gate_up.shape), "[tokens, 2 * n]")
    require(gate_up.is_floating_point() and gate_up.element_size() <= 4, "gate_up", gate_up.dtype, "a float type")
    require(gate_up.stride(1) == 1, "gate_up", f"strides {gate_up.stride()}", "rows of contiguous elements")
    require(kind in get_args(GateKind), "kind", repr(kind), f"one of {get_args(GateKind)}")
    tokens, length = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, length, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        grid = (tokens, triton.cdiv(length, _BLOCK))
        _gate[grid](
            gate_up, out, length, gate_up.stride(0), GELU=kind == "gelu_tanh", BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _gate(
    gate_up: tl.tensor,
    out: tl.tensor,
    length: int,
    stride: int,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    gate = tl.load(gate_up + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + length + at, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        tanh = 2.0 / (1.0 + tl.exp(-slope)) - 1.0
        active = 0.5 * gate * (1.0 + tanh)  # loses the digits near -1 that torch loses
    else:
        active = gate / (1.0 + tl.exp(-gate))
    dtype = out.dtype.element_ty
    tl.store(out + row * length + at, (active.to(dtype).to(tl.float32) * up).to(dtype), mask=inside)
