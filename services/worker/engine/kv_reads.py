"""Where attention finds K and V of a step's sequences: here copied out of their pages, by table."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.pages import PageViews
from services.worker.engine.batch import Placed
from services.worker.engine.scratch import Scratch
from services.worker.engine.spans import GROUP_KEYS, of_like_length, padded_ids, seen_mask, span_of


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decoding sequences that are read as one batch."""

    rows: Tensor | slice
    """Rows of the flat batch; int64 [sequences] if they are no slice."""
    mask: Tensor | None
    """[sequences, keys] in the computation's dtype: 0 where the key is seen, -inf where not; None: all are seen."""
    keys_values: Callable[[int], Tensor]
    """Layer -> [sequences, keys, 2 (K, V), kv_heads, head_dim], valid until the scratch's frame ends."""


@dataclass(frozen=True, slots=True)
class PrefillRun:
    """One prefilling sequence."""

    rows: slice
    keys_values: Callable[[int], Tensor]
    """Layer -> [keys, 2 (K, V), kv_heads, head_dim], likewise; the last `rows` of the keys are the run's own."""


class KvReads(Protocol):
    """Reads what the segments of one step see. Lives as long as the step."""

    def decode_groups(self, decodes: Sequence[Placed], window_tokens: int | None) -> list[DecodeGroup]:
        """Groups that cover `decodes`, each of which computes one token."""
        ...

    def prefill_runs(self, prefills: Sequence[Placed], window_tokens: int | None) -> list[PrefillRun]:
        """One for each, in their order."""
        ...


class PagedReads:
    """Copies pages into scratch, a group or a run at a time."""

    def __init__(self, pages: PageViews, dtype: torch.dtype, scratch: Scratch, *, group_keys: int = GROUP_KEYS) -> None:
        """`dtype` is computed with. `group_keys`: of decoding sequences that are gathered together; 0: one at a time."""
        self.pages, self.dtype, self._scratch, self._group_keys = pages, dtype, scratch, group_keys

    def decode_groups(self, decodes: Sequence[Placed], window_tokens: int | None) -> list[DecodeGroup]:
        """Sequences of similar length, padded to the longest."""
        block_tokens = self.pages.block_tokens
        spans = [span_of(one.segment, window_tokens, block_tokens) for one in decodes]
        groups = of_like_length(spans, block_tokens, self._group_keys)
        found: list[DecodeGroup] = []
        for places in groups:
            chosen = sorted(places)
            members = [spans[place] for place in chosen]
            ids = torch.from_numpy(padded_ids(members))
            mask = torch.from_numpy(seen_mask(members, ids.shape[2] * block_tokens)).to(self.dtype)
            rows = rows_of([decodes[place].row for place in chosen])
            found.append(DecodeGroup(rows, mask, functools.partial(self._gather, ids)))
        return found

    def prefill_runs(self, prefills: Sequence[Placed], window_tokens: int | None) -> list[PrefillRun]:
        """From the first block on that one of the run's tokens sees."""
        found: list[PrefillRun] = []
        for one in prefills:
            span = span_of(one.segment, window_tokens, self.pages.block_tokens)
            ids = torch.from_numpy(span.ids.astype("int64"))
            found.append(PrefillRun(one.rows, functools.partial(self._gather, ids, keys=span.end - span.first_key)))
        return found

    def _gather(self, ids: Tensor, layer: int, *, keys: int | None = None) -> Tensor:
        """Pages `ids` [layers, ..., blocks] -> [..., keys, 2, kv_heads, head_dim], the first `keys` of each."""
        pages, mine = self.pages, ids[layer]
        shape = (*mine.shape[:-1], mine.shape[-1] * pages.block_tokens, 2, pages.kv_heads, pages.head_dim)
        gathered = pages.gather_into(self._scratch.take(shape, pages.dtype), mine)
        return self.computed_with(gathered if keys is None else gathered[:keys])

    def computed_with(self, keys_values: Tensor) -> Tensor:
        """In the computation's dtype: a copy in scratch where the pages have another."""
        if keys_values.dtype is self.dtype:
            return keys_values
        return self._scratch.take(tuple(keys_values.shape), self.dtype).copy_(keys_values)


def rows_of(rows: Sequence[int]) -> Tensor | slice:
    """As a slice, if they follow one another."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, dtype=torch.int64)
