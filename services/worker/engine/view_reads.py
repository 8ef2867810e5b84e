"""K and V of a step's sequences where they lie: each sequence's pages are mapped one behind the other.

Nothing is copied, and no table is looked up while attention runs. Source: vTensor (arXiv 2407.15309), FlexInfer.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from common.ids import RequestId
from kvstore.memory.sequence_views import SequenceViews
from services.worker.core.plan import Segment
from services.worker.engine.batch import Placed
from services.worker.engine.kv_reads import DecodeGroup, PagedReads, PrefillRun, rows_of
from services.worker.engine.spans import GROUP_KEYS, Span, seen_mask, span_of


@contextmanager
def shown(views: SequenceViews, segments: Sequence[Segment], block_tokens: int) -> Iterator[dict[RequestId, int]]:
    """A step of these segments: gives the slot of each that is shown, until the step has read all it reads.

    A sequence that is not among them must be read by its table. What a table holds beyond this step is mapped meanwhile.
    """
    tables = [(one.request, one.table.ids, -(-(one.start + one.count) // block_tokens)) for one in segments]
    views.begin_step([request for request, _, _ in tables])
    try:
        slots: dict[RequestId, int] = {}
        for request, ids, needed_blocks in tables:
            slot = views.show(request, ids[:, :needed_blocks])
            if slot is not None:
                slots[request] = slot
        for request, ids, needed_blocks in tables:
            if request in slots and ids.shape[1] > needed_blocks:
                views.ahead(request, ids)
        yield slots
    finally:
        views.end_step()


@dataclass(frozen=True, slots=True)
class _Shown:
    """A decoding sequence that is shown."""

    slot: int
    row: int
    span: Span


class ViewReads:
    """Reads shown sequences where they are mapped, and the others through `paged`. Lives as long as the step.

    Only tokens that the sequence has are touched: what lies behind its last block may have no memory.
    """

    def __init__(self, views: SequenceViews, slots: Mapping[RequestId, int], paged: PagedReads) -> None:
        self._views, self._slots, self._paged = views, slots, paged

    def decode_groups(self, decodes: Sequence[Placed], window_tokens: int | None) -> list[DecodeGroup]:
        """Sequences with as many blocks, whose slots lie at equal distances, are one strided tensor."""
        block_tokens = self._paged.pages.block_tokens
        mapped: list[_Shown] = []
        others: list[Placed] = []
        for one in decodes:
            slot = self._slots.get(one.segment.request)
            if slot is None:
                others.append(one)
            else:
                mapped.append(_Shown(slot, one.row, span_of(one.segment, window_tokens, block_tokens)))
        groups = [self._group(members) for members in _at_equal_distances(mapped, block_tokens)]
        return groups + (self._paged.decode_groups(others, window_tokens) if others else [])

    def prefill_runs(self, prefills: Sequence[Placed], window_tokens: int | None) -> list[PrefillRun]:
        """From the first key on that one of the run's tokens sees."""
        return [self._run(one, window_tokens) for one in prefills]

    def _run(self, one: Placed, window_tokens: int | None) -> PrefillRun:
        slot = self._slots.get(one.segment.request)
        if slot is None:
            return self._paged.prefill_runs([one], window_tokens)[0]
        span = span_of(one.segment, window_tokens, self._paged.pages.block_tokens)
        return PrefillRun(one.rows, functools.partial(self._one, slot, span.first_needed, span.end))

    def _group(self, members: Sequence[_Shown]) -> DecodeGroup:
        rows, (first, *_) = rows_of([one.row for one in members]), members
        if len(members) == 1:
            return DecodeGroup(rows, None, functools.partial(self._alone, first))
        spans = [one.span for one in members]
        keys = max(span.end for span in spans) - first.span.first_key
        mask = torch.from_numpy(seen_mask(spans, keys)).to(self._paged.dtype)
        return DecodeGroup(rows, mask, functools.partial(self._together, members, keys))

    def _one(self, slot: int, first: int, end: int, layer: int) -> Tensor:
        return self._paged.computed_with(self._views.keys_values(slot, layer, first, end))

    def _alone(self, one: _Shown, layer: int) -> Tensor:
        return self._one(one.slot, one.span.first_seen, one.span.end, layer)[None]

    def _together(self, members: Sequence[_Shown], keys: int, layer: int) -> Tensor:
        """Keys from the first block's first on; those behind a sequence's own lie in its last block still."""
        pages, views, (first, second, *_) = self._paged.pages, self._views, members
        token = views.token_elements
        begin = views.start(first.slot, layer)
        shape = (len(members), keys, 2, pages.kv_heads, pages.head_dim)
        strides = (views.start(second.slot, layer) - begin, token, token // 2, pages.head_dim, 1)
        return self._paged.computed_with(views.tensor.as_strided(shape, strides, begin + first.span.first_key * token))


def _at_equal_distances(mapped: Sequence[_Shown], block_tokens: int) -> list[list[_Shown]]:
    """Groups of sequences that read equally many blocks from the same one on, in the order of their slots."""
    groups: list[list[_Shown]] = []
    for one in sorted(mapped, key=lambda one: (one.span.first_key, one.span.blocks, one.slot)):
        if groups and _joins(one, groups[-1], block_tokens):
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _joins(one: _Shown, group: Sequence[_Shown], block_tokens: int) -> bool:
    first, last = group[0], group[-1]
    alike = (one.span.first_key, one.span.blocks) == (first.span.first_key, first.span.blocks)
    even = len(group) == 1 or one.slot - last.slot == last.slot - group[-2].slot
    return alike and even and (len(group) + 1) * one.span.blocks * block_tokens <= GROUP_KEYS
