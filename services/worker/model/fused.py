"""The decoder on a GPU: the layers' weights in few matrices, the operators between the products fused.

The meaning is `transformers`' own layer code, rounding included: every value that its operators round to the model's
dtype is rounded here too, so that only the order of additions inside a product differs. A layer is

    x      = norm(hidden)                                   one kernel, with the addition of what came before
    q      = rotate(qkv product); k, v -> pages             one product, one kernel
    hidden = hidden + attention(q, pages) Wo                one product
    hidden = hidden + gate_up/down products                 two products, one kernel between them
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from transformers import PreTrainedConfig, PreTrainedModel

from common.errors import ConfigError
from kernels.activation import GateKind, gated
from kernels.norms import add_rms_norm, rms_norm
from services.worker.model.interface import window_of

Angles = dict[str | None, tuple[Tensor, Tensor]]
"""Cosine and sine [tokens, head_dim] per rotary type."""
_ACTIVATIONS: dict[str, GateKind] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedLayer:
    """Weights of one decoder layer. Matrices are [out, in]."""

    index: int
    qkv: Tensor
    """[(heads + 2 kv_heads) * head_dim, hidden]: all queries, then all keys, then all values."""
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    gate_up: Tensor
    """[2 * intermediate, hidden]"""
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    before_attention: Tensor
    after_attention: Tensor | None
    """Norm of what attention gives, before it is added (gemma); None: none."""
    before_mlp: Tensor
    after_mlp: Tensor | None
    query_norm: Tensor | None
    """[head_dim], per head, before the rotation (qwen3, gemma); None: none."""
    key_norm: Tensor | None
    heads: int
    scaling: float
    window_tokens: int | None
    rotary_type: str | None
    """Which angles, where a model has several; else None."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is there."""
        values = (getattr(self, name) for name in self.__slots__)
        return tuple(value for value in values if isinstance(value, Tensor))


@dataclass(frozen=True, slots=True)
class NormTerms:
    """What a family's RMS norms share."""

    epsilon: float
    offset: float
    """Added to the stored weight: gemma 1, others 0."""


class FusedStep(Protocol):
    """Attention of one forward pass; knows where every token's keys and values are."""

    def attend(self, layer: FusedLayer, qkv: Tensor, cos: Tensor, sin: Tensor, norm: NormTerms) -> Tensor:
        """`qkv` [tokens, (heads + 2 kv_heads) * head_dim] as the product gave it; cos and sin [tokens, head_dim].

        Normalises and rotates, keeps keys and values, returns [tokens, heads * head_dim].
        """
        ...


class FusedDecoder:
    """A loaded model on a GPU. Stateless between calls; `run` may be captured in a CUDA graph."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[FusedLayer], head: Tensor, norm: NormTerms) -> None:
        """Takes embedding, rotary angles and the final norm from `model`, whose layers may be gone by now."""
        self.layers, self._head, self._norm = tuple(layers), head, norm
        table = cast(nn.Embedding, model.get_submodule("model.embed_tokens"))
        self._embedding = table.weight
        self._embedding_scale = cast(Tensor | None, getattr(table, "embed_scale", None))
        self._rotary = model.get_submodule("model.rotary_emb")
        self._final = cast(Tensor, model.get_submodule("model.norm").weight)
        self._activation = activation_kind(model.config)

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights, each counted once: a head may share the embedding's."""
        outer = {tensor.data_ptr(): tensor.nbytes for tensor in (self._embedding, self._head, self._final)}
        return sum(outer.values()) + sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors)

    def run(self, ids: Tensor, positions: Tensor, step: FusedStep) -> Tensor:
        """Hidden states [tokens, hidden] after the last layer, before the final norm.

        ids, positions [tokens] int64: the position of each token in its own sequence.
        """
        hidden = embedding(ids, self._embedding)
        if self._embedding_scale is not None:
            hidden = hidden * self._embedding_scale
        angles = self._angles(hidden, positions)
        norm = self._norm
        added: Tensor | None = None
        for layer in self.layers:
            x = self._normed(added, hidden, layer.before_attention)
            qkv = linear(x, layer.qkv, layer.qkv_bias)
            attended = linear(step.attend(layer, qkv, *angles[layer.rotary_type], norm), layer.out, layer.out_bias)
            if layer.after_attention is not None:
                attended = rms_norm(attended, layer.after_attention, norm.epsilon, offset=norm.offset)
            x = self._normed(attended, hidden, layer.before_mlp)
            gate_up = linear(x, layer.gate_up, layer.gate_up_bias)
            added = linear(gated(gate_up, kind=self._activation), layer.down, layer.down_bias)
            if layer.after_mlp is not None:
                added = rms_norm(added, layer.after_mlp, norm.epsilon, offset=norm.offset)
        return hidden if added is None else hidden.add_(added)

    def _normed(self, added: Tensor | None, hidden: Tensor, weight: Tensor) -> Tensor:
        """`hidden` += `added` in place, and its norm."""
        norm = self._norm
        if added is None:
            return rms_norm(hidden, weight, norm.epsilon, offset=norm.offset)
        return add_rms_norm(added, hidden, weight, norm.epsilon, offset=norm.offset)

    @property
    def vocab_tokens(self) -> int:
        """Columns of the logits."""
        return self._head.shape[0]

    def logits_into(self, out: Tensor, hidden: Tensor) -> Tensor:
        """[rows, hidden] of `run` -> `out` [rows, vocab] in the model's dtype, contiguous, which is returned."""
        normed = rms_norm(hidden, self._final, self._norm.epsilon, offset=self._norm.offset)
        return torch.mm(normed, self._head.t(), out=out)

    def _angles(self, hidden: Tensor, positions: Tensor) -> Angles:
        """Cosine and sine [tokens, head_dim] per rotary type."""
        found: Angles = {}
        for kind in dict.fromkeys(layer.rotary_type for layer in self.layers):
            named = () if kind is None else (kind,)
            cos, sin = self._rotary(hidden.unsqueeze(0), positions.unsqueeze(0), *named)
            found[kind] = (cos[0], sin[0])
        return found


def activation_kind(config: PreTrainedConfig) -> GateKind:
    """Name of the MLP's activation in `kernels.activation`. Raises ConfigError for one that is not there."""
    named = getattr(config, "hidden_activation", None) or config.hidden_act
    if named not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ConfigError(f"the model's activation is {named}; on a GPU it must be one of {known}; use --device cpu")
    return _ACTIVATIONS[named]


def norm_terms(config: PreTrainedConfig) -> NormTerms:
    """Of this model's family."""
    return NormTerms(float(config.rms_norm_eps), 1.0 if config.model_type == "gemma3_text" else 0.0)


def fuse_layer(layer: nn.Module, config: PreTrainedConfig) -> FusedLayer:
    """The weights of one of `transformers`' layers, joined. The layer keeps its own until it is dropped."""
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    gemma = config.model_type == "gemma3_text"
    qkv, qkv_bias = _join(attention, ("q_proj", "k_proj", "v_proj"))
    out, out_bias = _join(attention, ("o_proj",))
    gate_up, gate_up_bias = _join(mlp, ("gate_proj", "up_proj"))
    down, down_bias = _join(mlp, ("down_proj",))
    index = cast(int, attention.layer_idx)
    return FusedLayer(
        index=index,
        qkv=qkv,
        qkv_bias=qkv_bias,
        out=out,
        out_bias=out_bias,
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=down,
        down_bias=down_bias,
        before_attention=_weight(layer, "input_layernorm"),
        after_attention=_weight(layer, "post_attention_layernorm") if gemma else None,
        before_mlp=_weight(layer, "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"),
        after_mlp=_weight(layer, "post_feedforward_layernorm") if gemma else None,
        query_norm=_weight(attention, "q_norm") if hasattr(attention, "q_norm") else None,
        key_norm=_weight(attention, "k_norm") if hasattr(attention, "k_norm") else None,
        heads=config.num_attention_heads,
        scaling=float(cast(float, attention.scaling)),
        window_tokens=window_of(attention, config),
        rotary_type=config.layer_types[index] if gemma else None,
    )


def _weight(module: nn.Module, name: str) -> Tensor:
    return cast(Tensor, module.get_submodule(name).weight).detach()


def _join(module: nn.Module, names: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
    linears = [cast(nn.Linear, module.get_submodule(name)) for name in names]
    weight = linears[0].weight.detach() if len(linears) == 1 else torch.cat([one.weight.detach() for one in linears])
    if all(one.bias is None for one in linears):
        return weight, None
    return weight, torch.cat(
        [weight.new_zeros(one.out_features) if one.bias is None else one.bias.detach() for one in linears]
    )
