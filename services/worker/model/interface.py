"""The seam between `transformers`' layers and whoever keeps their keys and values."""

from typing import Any, Protocol  # Any: keyword arguments that transformers' layers pass through

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

ATTENTION_NAME = "penstock"
"""Name of our attention function in `transformers`' registry."""


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


def register_attention() -> None:
    """Make ATTENTION_NAME known to `transformers`. Registering again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, _attend)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **call: Any,
) -> tuple[Tensor, None]:
    """What a layer calls: query [1, heads, tokens, head_dim], key and value likewise -> [1, tokens, heads, head_dim].

    `call` holds the layer's `scaling`, its `sliding_window` if it has one, and the `step` that the runner passed in.
    """
    step: StepAttention = call["step"]
    layer: int = module.layer_idx  # type: ignore[assignment]  # every attention module of transformers has it
    out = step.attend(
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling=call["scaling"],
        window_tokens=call.get("sliding_window"),
    )
    return out.unsqueeze(0), None


def _no_mask(*_: object, **__: object) -> None:
    """Which keys a token sees is known from its position and its sequence's pages."""
