"""Linear layers behind one seam: fused, prepacked where the processor gains by it, plain matrices everywhere else.

Which way is taken follows from what the device can do, never from a timing, so that two equal machines compute alike:

    device and dtype                             weights held as                  computed in
    cuda                                         joined matrices (fused.py)       the model's dtype
    cpu, float32                                 oneDNN blocks, float32           float32
    cpu, bfloat16, oneDNN multiplies bf16 here   oneDNN blocks, bfloat16          bfloat16
    cpu, bfloat16, oneDNN does not               oneDNN blocks, float32 (2x)      float32
    cpu, torch without oneDNN                    joined matrices, float32         float32

oneDNN multiplies bf16 on processors with AVX-512 (best with AVX512_BF16 or AMX) or AVX_NE_CONVERT. Elsewhere, the
fourth row, the matrices take twice the checkpoint's memory: products of bf16 matrices would run up to 8 times slower
than those of their float32 copies. Activations are then float32 too; pages and the embedding table stay bfloat16.
"""

from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn


class LinearPath(Enum):
    """How matrices are held and multiplied."""

    PLAIN = auto()
    PACKED = auto()
    FUSED = auto()


def choose_path(device: torch.device) -> LinearPath:
    """FUSED on a GPU, PACKED on a CPU whose torch has oneDNN."""
    if device.type == "cuda":
        return LinearPath.FUSED
    return LinearPath.PACKED if torch.backends.mkldnn.is_available() else LinearPath.PLAIN


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Dtype of matrices and activations for a model of `dtype` on `device`; see the module's table."""
    if device.type == "cpu" and dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return dtype


class Linear(Protocol):
    """y = x W^T + b with W [out, in]."""

    @property
    def out_features(self) -> int:
        """Columns of y."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Memory that it holds."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] of W's dtype -> [..., out]."""
        ...


class PackedLinear:
    """W in oneDNN's blocked layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features = weight.shape[0]
        self.weight_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self._bias = None if bias is None else bias.detach().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """The product; x should be contiguous for speed, need not be for correctness."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")


class PlainLinear:
    """W as it came."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self._bias = weight.detach(), None if bias is None else bias.detach()
        self.out_features = weight.shape[0]
        self.weight_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        return nn.functional.linear(x, self.weight, self._bias)


MakeLinear: TypeAlias = Callable[[Tensor, Tensor | None], Linear]


class GatedMlp:
    """down(act(gate(x)) * up(x)) with gate and up as one product."""

    def __init__(self, gate_up: Linear, down: Linear, activation: Callable[[Tensor], Tensor]) -> None:
        self._gate_up, self._down, self._activation = gate_up, down, activation
        self._width = gate_up.out_features // 2
        self.weight_bytes = gate_up.weight_bytes + down.weight_bytes

    def __call__(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        gate_up = self._gate_up(x)
        gate, up = gate_up[..., : self._width], gate_up[..., self._width :]
        return self._down(self._activation(gate) * up)


class RmsNorm:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension, in one call."""

    def __init__(self, norm: nn.Module, offset: float) -> None:
        """Of one of `transformers`' norms. `offset` is what the architecture adds to the stored weight: gemma 1, others 0."""
        weight = cast(Tensor, norm.weight).detach()
        self._weight = weight + offset if offset else weight
        self._epsilon = cast(float, norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
        self._shape = tuple(weight.shape)
        self.weight_bytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """Same shape and dtype as x."""
        return nn.functional.rms_norm(x, self._shape, self._weight, self._epsilon)


def join(module: nn.Module, names: tuple[str, ...], make: MakeLinear) -> Linear:
    """One matrix that computes all of these linear submodules, in their order."""
    linears = [cast(nn.Linear, module.get_submodule(name)) for name in names]
    weight = linears[0].weight.detach() if len(linears) == 1 else torch.cat([one.weight.detach() for one in linears])
    biases = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        return make(weight, None)
    filled = [
        weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach() for linear in linears
    ]
    return make(weight, torch.cat(filled))
