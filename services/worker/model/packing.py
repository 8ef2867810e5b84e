"""Linear layers behind one seam: fused, prepacked where the processor gains by it, plain modules everywhere else.

Which way is taken follows from what the device can do, never from a timing, so that two equal machines compute alike:

    device and dtype                             weights held as                  computed in
    cuda                                         joined matrices (fused.py)       the model's dtype
    cpu, float32                                 oneDNN blocks, float32           float32
    cpu, bfloat16, oneDNN multiplies bf16 here   oneDNN blocks, bfloat16          bfloat16
    cpu, bfloat16, oneDNN does not               oneDNN blocks, float32 (2x)      float32
    cpu, torch without oneDNN                    plain modules, float32           float32

oneDNN multiplies bf16 on processors with AVX-512 (best with AVX512_BF16 or AMX) or AVX_NE_CONVERT. Elsewhere, the
fourth row, the matrices take twice the checkpoint's memory: products of bf16 matrices would run up to 8 times slower
than those of their float32 copies. Activations are then float32 too; pages and the embedding table stay bfloat16.
"""

from enum import Enum, auto
from typing import cast

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


class PackedLinear(nn.Module):
    """y = x W^T + b with W [out, in] in oneDNN's blocked layout. x is [..., in] of W's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self._bias = None if bias is None else bias.detach().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """The product; x must be contiguous for speed, not for correctness."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")


class LeadingProjection(nn.Module):
    """First of several projections of the same input: computes all of them in one product, returns its own slice.

    Keeps the other slices until their FollowingProjection fetches them, so the layer's own code, which calls q, k and
    v one after the other on one tensor, runs unchanged.
    """

    def __init__(self, linear: PackedLinear, widths: list[int]) -> None:
        super().__init__()
        self.linear = linear
        self._widths = widths
        self._input: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., widths[0]]."""
        self._input = x
        self._parts = self.linear(x).split(self._widths, dim=-1)
        return self._parts[0]

    def take(self, x: Tensor, part: int) -> Tensor:
        """Slice `part` for the input that `forward` saw last; releases everything with the last part."""
        assert x is self._input, "projections of one layer must be called in order on one input"
        found = self._parts[part]
        if part == len(self._widths) - 1:
            self._input, self._parts = None, ()
        return found


class FollowingProjection(nn.Module):
    """A projection that its LeadingProjection has already computed."""

    def __init__(self, leading: LeadingProjection, part: int) -> None:
        super().__init__()
        self._leading = (leading,)  # in a tuple: the module tree must hold the matrix once
        self._part = part

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., widths[part]]."""
        return self._leading[0].take(x, self._part)


class PackedMlp(nn.Module):
    """down(act(gate(x)) * up(x)) with gate and up as one product."""

    def __init__(self, gate_up: PackedLinear, down: PackedLinear, activation: nn.Module) -> None:
        super().__init__()
        self.gate_up, self.down, self._activation = gate_up, down, activation
        self._width = gate_up.out_features // 2

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        gate_up = self.gate_up(x)
        gate, up = gate_up[..., : self._width], gate_up[..., self._width :]
        return cast(Tensor, self.down(self._activation(gate) * up))


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension, in one call."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._epsilon = epsilon
        self._shape = tuple(weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as x."""
        return nn.functional.rms_norm(x, self._shape, self.weight, self._epsilon)


def pack_layer(layer: nn.Module, norm_offset: float) -> None:
    """Replace the matrices and norms of one decoder layer in place. The plain weights are gone afterwards."""
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    names = ("q_proj", "k_proj", "v_proj")
    linears = [cast(nn.Linear, attention.get_submodule(name)) for name in names]
    leading = LeadingProjection(_fuse(linears), [linear.out_features for linear in linears])
    attention.set_submodule(names[0], leading)
    for part, name in enumerate(names[1:], start=1):
        attention.set_submodule(name, FollowingProjection(leading, part))
    attention.set_submodule("o_proj", _fuse([cast(nn.Linear, attention.get_submodule("o_proj"))]))
    gate_up = _fuse([cast(nn.Linear, mlp.get_submodule(name)) for name in ("gate_proj", "up_proj")])
    down = _fuse([cast(nn.Linear, mlp.get_submodule("down_proj"))])
    layer.set_submodule("mlp", PackedMlp(gate_up, down, mlp.get_submodule("act_fn")))
    for name, module in list(layer.named_modules()):
        if name.endswith("norm"):
            layer.set_submodule(name, pack_norm(module, norm_offset))


def pack_norm(norm: nn.Module, offset: float) -> RmsNorm:
    """The same norm in one operator. `offset` is what the architecture adds to the stored weight: gemma 1, others 0."""
    weight = cast(Tensor, norm.weight).detach()
    epsilon = cast(float, norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
    return RmsNorm(weight + offset if offset else weight, epsilon)


def pack_head(weight: Tensor, bias: Tensor | None) -> PackedLinear:
    """The output projection, packed from the (possibly shared) embedding matrix."""
    return PackedLinear(weight, bias)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and packed matrices, each counted once."""
    plain = sum(parameter.nbytes for parameter in model.parameters())
    return plain + sum(module.weight_bytes for module in model.modules() if isinstance(module, PackedLinear))


def _fuse(linears: list[nn.Linear]) -> PackedLinear:
    """One matrix that computes all of `linears`, in their order."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        return PackedLinear(weight, None)
    filled = [
        weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach() for linear in linears
    ]
    return PackedLinear(weight, torch.cat(filled))
