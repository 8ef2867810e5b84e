"""Runs the decoder layers of a model one after the other over a flat batch of tokens."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from services.worker.model.interface import StepAttention


class LayerRunner:
    """A loaded model, layer by layer. Stateless between calls; one thread at a time.

    The layers are `transformers`' own; keys and values go through the StepAttention of each call.
    """

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
        decoder = model.get_submodule("model")
        self._embed = decoder.get_submodule("embed_tokens")
        self._rotary = decoder.get_submodule("rotary_emb")
        self._layers = list(decoder.get_submodule("layers").children())
        self._norm = decoder.get_submodule("norm")
        self._head = model.get_submodule("lm_head")
        self._compute_dtype = compute_dtype
        config = model.config
        self._rotary_layer_types: list[str | None] = [None] * len(self._layers)
        if config.model_type == "gemma3_text":  # other angles for local and global layers
            self._rotary_layer_types = list(config.layer_types)

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self._layers)

    def run(self, ids: Tensor, positions: Tensor, step: StepAttention) -> Tensor:
        """Hidden states [tokens, hidden] after the last layer, before the final norm.

        ids, positions [tokens] int64: the position of each token in its own sequence.
        """
        position_ids = positions.unsqueeze(0)
        hidden = self._embed(ids.unsqueeze(0)).to(self._compute_dtype)
        angles = self._angles(hidden, position_ids)
        for layer, layer_type in zip(self._layers, self._rotary_layer_types, strict=True):
            hidden = layer(
                hidden,
                attention_mask=None,
                position_ids=position_ids,
                past_key_values=None,
                use_cache=False,
                position_embeddings=angles[layer_type],
                step=step,
            )
        return hidden[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] of `run` -> [rows, vocab] float32."""
        return self._head(self._norm(hidden)).float()

    def _angles(self, hidden: Tensor, position_ids: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
        """Cosine and sine [1, tokens, head_dim] per layer type."""
        return {
            layer_type: self._rotary(hidden, position_ids, *(() if layer_type is None else (layer_type,)))
            for layer_type in dict.fromkeys(self._rotary_layer_types)
        }
