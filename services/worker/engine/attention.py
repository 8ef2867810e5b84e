"""Attention of one step over pages: writes the step's keys and values, then reads every sequence's own."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import decode_attention, prefill_attention
from kernels.pages import PageViews
from services.worker.engine.batch import DecodeGroup, FlatBatch, PrefillRun, decode_groups, prefill_runs


@dataclass(frozen=True, slots=True)
class LayerHooks:
    """Who wants to hear of every layer of a step."""

    before_write: Callable[[int], None] | None = None
    """The layer's K and V are about to be written; returns when its pages may be: others may still read them as another
    layer's."""
    on_written: Callable[[int], None] | None = None
    """All K and V of the step are in the layer's pages."""
    before_read: Callable[[int], None] | None = None
    """The layer's pages are about to be read; returns when they may be."""


class PagedAttention:
    """The StepAttention of one step. Lives as long as the step; all it derives from the plan goes with it.

    Keys and values are always read back from the pages, the step's own included. What a token sees therefore does not
    depend on how the prompt was cut into chunks or where its pages came from.
    """

    def __init__(self, batch: FlatBatch, views: PageViews, dtype: torch.dtype, hooks: LayerHooks) -> None:
        self._batch, self._views, self._dtype, self._hooks = batch, views, dtype, hooks
        self._reads: dict[int | None, tuple[list[DecodeGroup], list[PrefillRun]]] = {}
        width = 2 * views.kv_heads * views.head_dim
        self._blank = torch.zeros(batch.blank_rows, width, dtype=dtype, device=batch.ids.device)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window_tokens: int | None
    ) -> Tensor:
        """See StepAttention. Tells the hooks of this layer."""
        if self._hooks.before_write is not None:
            self._hooks.before_write(layer)
        self._write(layer, key, value)
        if self._hooks.on_written is not None:
            self._hooks.on_written(layer)
        if self._hooks.before_read is not None:
            self._hooks.before_read(layer)
        groups, runs = self._reads_for(window_tokens)
        if not runs and groups[0].rows is None:
            return self._decode(layer, query, groups[0], scaling)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for group in groups:
            assert group.rows is not None, "a group without rows stands alone"
            out.index_copy_(0, group.rows, self._decode(layer, query.index_select(0, group.rows), group, scaling))
        for run in runs:
            keys, values = self._views.gather(run.ids[layer], self._dtype)[: run.keys].unbind(1)
            out[run.rows] = prefill_attention(
                query[run.rows], keys, values, scaling=scaling, window_tokens=window_tokens
            )[0]
        return out

    def _write(self, layer: int, key: Tensor, value: Tensor) -> None:
        tokens = key.shape[0]
        rows = torch.cat((key.reshape(tokens, -1), value.reshape(tokens, -1)), dim=1)
        if self._batch.blank_rows:
            rows = torch.cat((rows, self._blank))
        self._views.write_into(self._batch.write_rows[layer], rows)

    def _decode(self, layer: int, query: Tensor, group: DecodeGroup, scaling: float) -> Tensor:
        keys, values = self._views.gather(group.ids[layer], self._dtype).unbind(2)
        return decode_attention(query, keys, values, group.mask, scaling=scaling, may_be_empty=False)[0]

    def _reads_for(self, window_tokens: int | None) -> tuple[list[DecodeGroup], list[PrefillRun]]:
        if window_tokens not in self._reads:
            block_tokens = self._views.block_tokens
            self._reads[window_tokens] = (
                decode_groups(self._batch, window_tokens, block_tokens, self._dtype),
                prefill_runs(self._batch, window_tokens, block_tokens),
            )
        return self._reads[window_tokens]
