"""Which engine computes on which device."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.errors import ConfigError
from kvstore.memory.sequence_views import SequenceViews
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


def require_kv_layout(kv_layout: str, device: torch.device) -> None:
    """Raise ConfigError if no engine of the device reads this layout."""
    if kv_layout == "virtual" and device.type != "cpu":
        raise ConfigError(
            f"--kv-layout=virtual with --device={device}: sequences are read through views on a CPU only; take paged"
        )


def make_engine(
    model: LoadedModel,
    pages: Tensor,
    limits: EngineLimits,
    marks: LayerEvents | None = None,
    views: SequenceViews | None = None,
) -> "TorchEngine | FusedEngine":
    """An engine over `pages` [pages, block_tokens, 2, kv_heads, head_dim]. Raises ConfigError if they do not fit.

    `marks` tell whoever copies from the pages when a layer is written; None: nobody does. `views` of these pages show
    sequences to whoever reads them; None: they are read by table.
    """
    if isinstance(model.runner, TiledDecoder):
        return TorchEngine(model, pages, model.layout, views)
    assert views is None, "`require_kv_layout` says where sequences are read through views"
    from services.worker.engine.fused.engine import FusedEngine  # needs triton, which a CPU has no use for

    return FusedEngine(model, pages, limits, marks or NoLayerEvents())
