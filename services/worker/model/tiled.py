"""The decoder on a CPU: whatever grows with the rows of a step lies in its scratch, the rest is computed by tiles of rows.

The meaning is `transformers`' own layer code, rounding included: every value that its operators round to the dtype of the
computation is rounded here too. A layer is

    for every tile      qkv    = rotate(norm(hidden) Wqkv)
    for all rows        attended = attention(q, pages), k and v -> pages
    for every tile      hidden = hidden + attended Wo
                        hidden = hidden + mlp(norm(hidden))

So a long prompt needs a few rows of floats per token, and never its MLP's intermediate values for more than a tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from services.worker.engine.scratch import Scratch
from services.worker.model.interface import StepAttention, window_of
from services.worker.model.packing import GatedMlp, Linear, MakeLinear, PlainLinear, RmsNorm, join

TILE_ROWS = 256
"""Enough for a product to run at full speed; few enough that a tile's values stay in the caches between operators."""


@dataclass(frozen=True, slots=True)
class TileAngles:
    """Of the rows of one tile, for one rotary type."""

    cos: Tensor
    """[rows, 1, head_dim]"""
    sin: Tensor
    """[rows, 1, head_dim], the first half negated, as rotating a half of the head negates what it is multiplied with."""


Angles = dict[str | None, list[TileAngles]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledLayer:
    """One decoder layer, and what it does with the rows of a tile."""

    index: int
    qkv: Linear
    """hidden -> all queries, then all keys, then all values."""
    out: Linear
    mlp: GatedMlp
    before_attention: RmsNorm
    after_attention: RmsNorm | None
    """Of what attention gives, before it is added (gemma); None: none."""
    before_mlp: RmsNorm
    after_mlp: RmsNorm | None
    query_norm: RmsNorm | None
    """Per head, before the rotation (qwen3, gemma); None: none."""
    key_norm: RmsNorm | None
    heads: int
    scaling: float
    window_tokens: int | None
    rotary_type: str | None
    """Which angles, where a model has several; else None."""

    @property
    def weight_bytes(self) -> int:
        """Memory of all its weights."""
        norms = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        per_head = (self.query_norm, self.key_norm)
        matrices_bytes = self.qkv.weight_bytes + self.out.weight_bytes + self.mlp.weight_bytes
        return matrices_bytes + sum(norm.weight_bytes for norm in (*norms, *per_head) if norm is not None)

    def project_into(self, out: Tensor, hidden: Tensor, angles: TileAngles) -> None:
        """`hidden` [rows, hidden] -> `out` [rows, heads + 2 kv_heads, head_dim], rotated."""
        product = self.qkv(self.before_attention(hidden)).view(out.shape)
        turned = (out.shape[1] + self.heads) // 2  # queries and keys
        x = product[:, :turned]
        if self.query_norm is not None and self.key_norm is not None:
            x = torch.cat((self.query_norm(x[:, : self.heads]), self.key_norm(x[:, self.heads :])), dim=1)
        half = out.shape[2] // 2
        crossed = torch.cat((x[..., half:], x[..., :half]), dim=-1).mul_(angles.sin)
        torch.add(x * angles.cos, crossed, out=out[:, :turned])
        out[:, turned:] = product[:, turned:]

    def add_into(self, hidden: Tensor, attended: Tensor) -> None:
        """All behind attention: `attended` [rows, heads, head_dim] -> `hidden` [rows, hidden], which goes on."""
        added = self.out(attended.flatten(1))
        hidden += added if self.after_attention is None else self.after_attention(added)
        added = self.mlp(self.before_mlp(hidden))
        hidden += added if self.after_mlp is None else self.after_mlp(added)


class TiledDecoder:
    """A loaded model on a CPU. Stateless between calls; one thread at a time."""

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[TiledLayer], norm: RmsNorm, head: Linear, dtype: torch.dtype
    ) -> None:
        """Takes embedding and rotary angles from `model`, whose layers may be gone by now. `dtype` is computed in."""
        self.layers, self._norm, self._head, self._dtype = tuple(layers), norm, head, dtype
        self._embed = cast(nn.Embedding, model.get_submodule("model.embed_tokens"))
        self._rotary = model.get_submodule("model.rotary_emb")
        config = model.config
        self._rotary_types = list(dict.fromkeys(layer.rotary_type for layer in layers))
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = layers[0].qkv.out_features // (self._heads + 2 * self._kv_heads)

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights, each counted once: a head may share the embedding's."""
        table = self._embed.weight
        shared = isinstance(self._head, PlainLinear) and self._head.weight.data_ptr() == table.data_ptr()
        outer_bytes = table.nbytes + self._norm.weight_bytes + (0 if shared else self._head.weight_bytes)
        return outer_bytes + sum(layer.weight_bytes for layer in self.layers)

    @property
    def row_bytes(self) -> int:
        """What `run` takes for each row of a step, beside gaps between its `n_taken` tensors."""
        per_head = 2 * self._heads + 2 * self._kv_heads + 2 * len(self._rotary_types)
        return (self._embed.embedding_dim + per_head * self._head_dim) * self._dtype.itemsize

    @property
    def n_taken(self) -> int:
        """Tensors that `run` takes."""
        return 3 + 2 * len(self._rotary_types)

    def run(self, ids: Tensor, positions: Tensor, step: StepAttention, scratch: Scratch) -> Tensor:
        """Hidden states [tokens, hidden] after the last layer, before the final norm; taken from `scratch`.

        ids, positions [tokens] int64: the position of each token in its own sequence.
        """
        tokens = ids.shape[0]
        hidden = scratch.take((tokens, self._embed.embedding_dim), self._dtype)
        qkv = scratch.take((tokens, self._heads + 2 * self._kv_heads, self._head_dim), self._dtype)
        attended = scratch.take((tokens, self._heads, self._head_dim), self._dtype)
        angles = self._angles(positions, scratch)
        query, key, value = qkv.split((self._heads, self._kv_heads, self._kv_heads), dim=1)
        hidden_tiles, qkv_tiles, attended_tiles = (one.split(TILE_ROWS) for one in (hidden, qkv, attended))
        for x, tile_ids in zip(hidden_tiles, ids.split(TILE_ROWS), strict=True):
            x.copy_(self._embed(tile_ids))
        for layer in self.layers:
            for tile, x, turns in zip(qkv_tiles, hidden_tiles, angles[layer.rotary_type], strict=True):
                layer.project_into(tile, x, turns)
            step.attend(
                layer.index,
                query,
                key,
                value,
                scaling=layer.scaling,
                window_tokens=layer.window_tokens,
                out=attended,
            )
            for x, seen in zip(hidden_tiles, attended_tiles, strict=True):
                layer.add_into(x, seen)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] of `run` -> [rows, vocab] float32."""
        return self._head(self._norm(hidden)).float()

    def _angles(self, positions: Tensor, scratch: Scratch) -> Angles:
        found: Angles = {}
        shape, like = (positions.shape[0], 1, self._head_dim), torch.empty(0, dtype=self._dtype)
        for kind in self._rotary_types:
            cos, sin = scratch.take(shape, self._dtype), scratch.take(shape, self._dtype)
            tiles = zip(cos.split(TILE_ROWS), sin.split(TILE_ROWS), strict=True)
            found[kind] = [TileAngles(*tile) for tile in tiles]
            for tile, at in zip(found[kind], positions.split(TILE_ROWS), strict=True):
                tile_cos, tile_sin = self._rotary(like, at.unsqueeze(0), *(() if kind is None else (kind,)))
                tile.cos.copy_(tile_cos[0].unsqueeze(1))
                tile.sin.copy_(tile_sin[0].unsqueeze(1))
                tile.sin[..., : self._head_dim // 2].neg_()
        return found


def tile_layer(layer: nn.Module, config: PreTrainedConfig, make: MakeLinear) -> TiledLayer:
    """One of `transformers`' layers, its matrices joined and held as `make` does. It keeps its own until it is dropped."""
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    gemma = config.model_type == "gemma3_text"
    index = cast(int, attention.layer_idx)

    def norm(owner: nn.Module, name: str) -> RmsNorm:
        return RmsNorm(owner.get_submodule(name), norm_offset(config))

    per_head = hasattr(attention, "q_norm")
    return TiledLayer(
        index=index,
        qkv=join(attention, ("q_proj", "k_proj", "v_proj"), make),
        out=join(attention, ("o_proj",), make),
        mlp=GatedMlp(
            join(mlp, ("gate_proj", "up_proj"), make), join(mlp, ("down_proj",), make), mlp.get_submodule("act_fn")
        ),
        before_attention=norm(layer, "input_layernorm"),
        after_attention=norm(layer, "post_attention_layernorm") if gemma else None,
        before_mlp=norm(layer, "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"),
        after_mlp=norm(layer, "post_feedforward_layernorm") if gemma else None,
        query_norm=norm(attention, "q_norm") if per_head else None,
        key_norm=norm(attention, "k_norm") if per_head else None,
        heads=config.num_attention_heads,
        scaling=float(cast(float, attention.scaling)),
        window_tokens=window_of(attention, config),
        rotary_type=config.layer_types[index] if gemma else None,
    )


def norm_offset(config: PreTrainedConfig) -> float:
    """What this family's norms add to the stored weight."""
    return 1.0 if config.model_type == "gemma3_text" else 0.0
