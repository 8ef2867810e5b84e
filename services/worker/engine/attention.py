"""Attention of one step over pages: writes the step's keys and values, then reads every sequence's own."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import decode_attention, prefill_attention
from kernels.pages import PageViews
from services.worker.engine.batch import FlatBatch
from services.worker.engine.kv_reads import DecodeGroup, KvReads, PrefillRun
from services.worker.engine.scratch import Scratch

TILE_ROWS = 512
"""Rows of a run that are computed at once, so that nothing temporary grows with a prompt."""


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

    def __init__(self, batch: FlatBatch, pages: PageViews, reads: KvReads, hooks: LayerHooks, scratch: Scratch) -> None:
        """Writes to `pages`; `reads` finds the same K and V. Its copies are in `scratch`, for one group or run each."""
        self._batch, self._pages, self._kv, self._hooks, self._scratch = batch, pages, reads, hooks, scratch
        self._planned: dict[int | None, tuple[list[DecodeGroup], list[PrefillRun]]] = {}

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
        if out is None:
            out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        groups, runs = self._plan(window_tokens)
        for group in groups:
            with self._scratch.frame():
                _decode_into(out, query, group, layer, scaling)
        for run in runs:
            with self._scratch.frame():
                keys, values = run.keys_values(layer).unbind(1)
                _prefill_into(out[run.rows], query[run.rows], keys, values, scaling, window_tokens)
        return out

    def _write(self, layer: int, key: Tensor, value: Tensor) -> None:
        tokens, rows = key.shape[0], self._batch.write_rows[layer]
        for first in range(0, tokens, TILE_ROWS):
            tile = slice(first, min(first + TILE_ROWS, tokens))
            own = torch.cat((key[tile].flatten(1), value[tile].flatten(1)), dim=1)
            self._pages.write_into(rows[tile], own)
        if self._batch.blank_rows:
            self._pages.blank(rows[tokens:])

    def _plan(self, window_tokens: int | None) -> tuple[list[DecodeGroup], list[PrefillRun]]:
        """What is read where tokens see so far, found once for all layers that are alike in this."""
        if window_tokens not in self._planned:
            self._planned[window_tokens] = (
                self._kv.decode_groups(self._batch.decodes, window_tokens),
                self._kv.prefill_runs(self._batch.prefills, window_tokens),
            )
        return self._planned[window_tokens]


def _decode_into(out: Tensor, query: Tensor, group: DecodeGroup, layer: int, scaling: float) -> None:
    keys, values = group.keys_values(layer).unbind(2)
    mine = query[group.rows]
    out[group.rows] = decode_attention(mine, keys, values, group.mask, scaling=scaling, may_be_empty=False)[0]


def _prefill_into(
    out: Tensor, query: Tensor, keys: Tensor, values: Tensor, scaling: float, window_tokens: int | None
) -> None:
    """A tile of queries at a time, over the keys that one of its queries sees."""
    before = keys.shape[0] - query.shape[0]
    for first in range(0, query.shape[0], TILE_ROWS):
        tile = slice(first, min(first + TILE_ROWS, query.shape[0]))
        begin = 0 if window_tokens is None else max(0, before + tile.start - window_tokens + 1)
        seen = slice(begin, before + tile.stop)
        out[tile] = prefill_attention(
            query[tile], keys[seen], values[seen], scaling=scaling, window_tokens=window_tokens
        )[0]
