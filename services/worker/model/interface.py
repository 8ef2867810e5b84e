"""The seam between a model's layers and whoever keeps their keys and values."""

from typing import Protocol, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig


class StepAttention(Protocol):
    """Attention of one forward pass over a flat batch; knows where every token's keys and values are."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        window_tokens: int | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """query [tokens, heads, head_dim], key and value [tokens, kv_heads, head_dim], rotary applied; any strides.

        Keeps key and value, returns [tokens, heads, head_dim]: `out`, if that is given, which must not overlap the others.
        """
        ...


def window_of(attention: nn.Module, config: PreTrainedConfig) -> int | None:
    """How far a token of this layer sees, itself included; None: all that is before it.

    As the layer hands it to its attention function: mistral reads it from the config, others hold it themselves.
    """
    held = getattr(attention, "sliding_window", None)
    if held is None and config.model_type == "mistral":
        held = getattr(config, "sliding_window", None)
    return None if held is None else int(cast(int, held))
