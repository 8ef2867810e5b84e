"""Attention of one step over pages: writes the step's keys and values, then reads every sequence's own."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import decode_attention, prefill_attention
from kernels.pages import PageViews
from services.worker.engine.batch import DecodeGroup, FlatBatch, PrefillRun, decode_groups, prefill_runs
from services.worker.engine.scratch import Scratch

QUERY_TILE = 512
"""Queries of a run whose attention is computed at once."""


def gathered_bytes(views: PageViews, dtype: torch.dtype) -> int:
    """What is taken of scratch for each key that is gathered: K and V as the pool has them, and as they are computed with."""
    element_bytes = views.dtype.itemsize + (0 if dtype is views.dtype else dtype.itemsize)
    return 2 * views.kv_heads * views.head_dim * element_bytes


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

    def __init__(
        self, batch: FlatBatch, views: PageViews, dtype: torch.dtype, hooks: LayerHooks, scratch: Scratch
    ) -> None:
        self._batch, self._views, self._dtype, self._hooks, self._scratch = batch, views, dtype, hooks, scratch
        self._reads: dict[int | None, tuple[list[DecodeGroup], list[PrefillRun]]] = {}
        width = views.kv_heads * views.head_dim
        self._blank = torch.zeros(batch.blank_rows, width, dtype=dtype, device=batch.ids.device)

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
        """See StepAttention. Tells the hooks of this layer."""
        if self._hooks.before_write is not None:
            self._hooks.before_write(layer)
        self._write(layer, key, value)
        if self._hooks.on_written is not None:
            self._hooks.on_written(layer)
        if self._hooks.before_read is not None:
            self._hooks.before_read(layer)
        groups, runs = self._reads_for(window_tokens)
        if out is None:
            out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for group in groups:
            with self._scratch.frame():
                if group.rows is None:
                    out.copy_(self._decode(layer, query, group, scaling))
                else:
                    queries = query.index_select(0, group.rows)
                    out.index_copy_(0, group.rows, self._decode(layer, queries, group, scaling))
        for run in runs:
            with self._scratch.frame():
                keys, values = self._gather(run.halves[layer])[:, : run.keys].unbind(0)
                before = run.keys - (run.rows.stop - run.rows.start)
                for first in range(run.rows.start, run.rows.stop, QUERY_TILE):
                    rows = slice(first, min(first + QUERY_TILE, run.rows.stop))
                    end = before + rows.stop - run.rows.start
                    out[rows] = prefill_attention(
                        query[rows], keys[:end], values[:end], scaling=scaling, window_tokens=window_tokens
                    )[0]
        return out

    def _write(self, layer: int, key: Tensor, value: Tensor) -> None:
        tokens = key.shape[0]
        parts = [key.reshape(tokens, -1), value.reshape(tokens, -1)]
        if self._batch.blank_rows:
            parts.append(self._blank)
        self._views.write_into(self._batch.write_rows[layer], torch.cat(parts))

    def _decode(self, layer: int, query: Tensor, group: DecodeGroup, scaling: float) -> Tensor:
        keys, values = self._gather(group.halves[layer]).unbind(0)
        return decode_attention(query, keys, values, group.mask, scaling=scaling, may_be_empty=False)[0]

    def _gather(self, halves: Tensor) -> Tensor:
        """Half pages [2, ..., blocks] -> [2, ..., keys, kv_heads, head_dim] in the computation's dtype."""
        views = self._views
        keys = halves.shape[-1] * views.block_tokens
        shape = (*halves.shape[:-1], keys, views.kv_heads, views.head_dim)
        gathered = views.gather_into(self._scratch.take(shape, views.dtype), halves)
        return gathered if self._dtype is views.dtype else self._scratch.take(shape, self._dtype).copy_(gathered)

    def _reads_for(self, window_tokens: int | None) -> tuple[list[DecodeGroup], list[PrefillRun]]:
        if window_tokens not in self._reads:
            block_tokens = self._views.block_tokens
            self._reads[window_tokens] = (
                decode_groups(self._batch, window_tokens, block_tokens, self._dtype),
                prefill_runs(self._batch, window_tokens, block_tokens),
            )
        return self._reads[window_tokens]
