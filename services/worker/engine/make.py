"""Which engine computes on which device."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from kvstore.transport.layer_events import LayerEvents, NoLayerEvents
from services.worker.engine.engine import TorchEngine
from services.worker.model.load import LoadedModel
from services.worker.model.tiled import TiledDecoder

if TYPE_CHECKING:
    from services.worker.engine.fused.engine import FusedEngine

SHORT_TOKENS = 1024
"""Rows of a step at the most that is one graph on a GPU: beyond, computing a layer takes longer than launching it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """The largest steps that will be asked for."""

    max_running: int
    """Segments of a step."""
    max_step_tokens: int
    """Rows of a step beside one per segment."""
    context_tokens: int


def make_engine(
    model: LoadedModel, pages: Tensor, limits: EngineLimits, marks: LayerEvents | None = None
) -> "TorchEngine | FusedEngine":
    """An engine over `pages` [pages, 2, block_tokens, kv_heads, head_dim]. Raises ConfigError if they do not fit.

    `marks` tell whoever copies from the pages when a layer is written; None: nobody does.
    """
    if isinstance(model.runner, TiledDecoder):
        return TorchEngine(model, pages, model.layout)
    from services.worker.engine.fused.engine import FusedEngine  # needs triton, which a CPU has no use for

    return FusedEngine(model, pages, limits, marks or NoLayerEvents())
