"""Attention of one step on a GPU: rotates and writes the step's keys and values, then reads every sequence's own."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.kv_source import PagedKv
from kernels.paged_decode import paged_decode
from kernels.paged_prefill import paged_prefill
from kernels.prefill_choice import prefill_runs
from kernels.rope import rope_write
from services.worker.core.plan import Segment
from services.worker.engine.attention import LayerHooks
from services.worker.engine.batch import count_decodes
from services.worker.model.fused import FusedLayer, NormTerms


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """Which rows are what. Decoding sequences come first, one row each; then the prefilling ones."""

    decodes: int
    decode_keys: int
    """No decoding sequence has more."""
    prefills: tuple[tuple[int, int], ...] = ()
    """(queries, keys) of each; the queries are the last of the keys."""
    runs: int = 0
    """Instead of `prefills`: so many runs of queries that only the device knows, none longer than `longest_run`."""
    longest_run: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlaces:
    """Where keys and values of a step's sequences lie. All on the device."""

    tables: Tensor
    """int32 [1 or layers, sequences, blocks]. One for all layers: pages of a block are neighbours, layer by layer."""
    slots: Tensor
    """int64 [1 or layers, tokens], likewise: where the step's own go; -1: nowhere."""
    lengths: Tensor
    """int32 [sequences]: keys, the step's own included; 0: a padding row."""
    query_starts: Tensor
    """int32 [prefills + 1]."""

    def of(self, pages: Tensor, layer: int) -> tuple[Tensor, PagedKv]:
        """Slots and source of one layer. `rope_write` adds the source's shift to the slots' pages."""
        if self.tables.shape[0] == 1:
            return self.slots[0], PagedKv(pages, self.tables[0], layer)
        return self.slots[layer], PagedKv(pages, self.tables[layer])


class PagedStep:
    """The FusedStep of one step. Lives as long as the step, or as the graph that it was captured in."""

    def __init__(self, pages: Tensor, shape: StepShape, places: StepPlaces, hooks: LayerHooks) -> None:
        self._pages, self._shape, self._places, self._hooks = pages, shape, places, hooks

    def attend(self, layer: FusedLayer, qkv: Tensor, cos: Tensor, sin: Tensor, norm: NormTerms) -> Tensor:
        """See FusedStep. Tells the hooks of this layer."""
        slots, source = self._places.of(self._pages, layer.index)
        if self._hooks.before_write is not None:
            self._hooks.before_write(layer.index)
        query = rope_write(
            qkv,
            cos,
            sin,
            self._pages,
            slots,
            heads=layer.heads,
            page_shift=source.page_shift,
            query_norm=layer.query_norm,
            key_norm=layer.key_norm,
            epsilon=norm.epsilon,
            offset=norm.offset,
        )
        if self._hooks.on_written is not None:
            self._hooks.on_written(layer.index)
        if self._hooks.before_read is not None:
            self._hooks.before_read(layer.index)
        return self._read(layer, query, source).flatten(1)

    def _read(self, layer: FusedLayer, query: Tensor, source: PagedKv) -> Tensor:
        decodes, prefills = self._shape.decodes, self._shape.prefills
        parts: list[Tensor] = []
        if decodes:
            own = PagedKv(source.pages, source.table[:decodes], source.page_shift)
            parts.append(
                paged_decode(
                    query[:decodes],
                    own,
                    self._places.lengths[:decodes],
                    scaling=layer.scaling,
                    max_length=self._shape.decode_keys,
                    window_tokens=layer.window_tokens,
                )[0]
            )
        if self._shape.runs:
            parts.append(
                paged_prefill(
                    query,
                    source,
                    self._places.query_starts,
                    self._places.lengths,
                    scaling=layer.scaling,
                    max_queries=self._shape.longest_run,
                    window_tokens=layer.window_tokens,
                )[0]
            )
        if prefills:
            own = PagedKv(source.pages, source.table[decodes:], source.page_shift)
            parts.append(
                prefill_runs(
                    query[decodes:],
                    own,
                    self._places.query_starts,
                    self._places.lengths[decodes:],
                    prefills,
                    scaling=layer.scaling,
                    window_tokens=layer.window_tokens,
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def step_shape(segments: Sequence[Segment]) -> StepShape:
    """Of a step's segments, the decoding ones first."""
    decodes = count_decodes(segments)
    return StepShape(
        decodes=decodes,
        decode_keys=max((one.start + 1 for one in segments[:decodes]), default=0),
        prefills=tuple((one.count, one.start + one.count) for one in segments[decodes:]),
    )
