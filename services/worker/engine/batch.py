"""From a step's plan to the arrays of one forward pass: ids, positions, where to write, where to read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.ids import RequestId
from services.worker.core.plan import Segment, StepPlan

GROUP_KEYS = 8192
"""Keys of a group of decoding sequences, padding included, unless it is one sequence: so much is gathered at once."""


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """All tokens of a step, one after the other; decoding segments first."""

    ids: Tensor
    """[tokens] int64."""
    positions: Tensor
    """[tokens] int64, of each token in its own sequence."""
    write_rows: Tensor
    """[layers, 2 * tokens + blank_rows] int64: token rows (kernels.pages) of all K, then all V, then rows to blank."""
    blank_rows: int
    """Rows of newly begun blocks behind their last token. Blanked, so that whatever the memory held before cannot
    reach a masked product: 0 * NaN is NaN."""
    decodes: tuple[Segment, ...]
    prefills: tuple[Segment, ...]
    sample_rows: Tensor
    """[samples] int64: rows of the batch to draw a token from, in the order of the plan."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decoding sequences of similar length, read as one padded batch."""

    rows: Tensor | None
    """[sequences] int64 rows of the flat batch; None: all rows of the batch in their order."""
    halves: Tensor
    """[layers, 2, sequences, blocks] int64, half pages (kernels.pages): K, then V."""
    mask: Tensor
    """[sequences, keys]: 0 where the key is seen, -inf where not."""


@dataclass(frozen=True, slots=True)
class PrefillRun:
    """One prefilling sequence."""

    rows: slice
    halves: Tensor
    """[layers, 2, blocks] int64, half pages: K, then V."""
    keys: int
    """Keys to read from the first block on; the last `rows` of them are the run's own."""


def build_batch(
    plan: StepPlan, block_tokens: int, device: torch.device, drawn: Mapping[RequestId, int] = MappingProxyType({})
) -> FlatBatch:
    """Everything about a step that does not depend on a layer's window. The plan must have at least one segment.

    `drawn`: tokens of the pending segments.
    """
    segments = plan.segments
    n_decodes = count_decodes(segments)
    ids: list[int] = []
    sample_rows: list[int] = []
    for segment in segments:
        if segment.pending:
            ids.append(drawn[segment.request])
        else:
            ids += segment.tokens[segment.start : segment.start + segment.count]
        if segment.sample:
            sample_rows.append(len(ids) - 1)
    positions = np.concatenate([np.arange(one.start, one.start + one.count) for one in segments])
    write_rows, blank_rows = _write_rows(segments, block_tokens)
    return FlatBatch(
        ids=torch.tensor(ids, device=device),
        positions=_to(positions, device),
        write_rows=_to(write_rows, device),
        blank_rows=blank_rows,
        decodes=segments[:n_decodes],
        prefills=segments[n_decodes:],
        sample_rows=torch.tensor(sample_rows, dtype=torch.int64, device=device),
    )


def count_decodes(segments: Sequence[Segment]) -> int:
    """How many leading segments compute one token; those behind are prefill, also a chunk of one token."""
    return next((i for i, segment in enumerate(segments) if segment.count != 1), len(segments))


def _write_rows(segments: Sequence[Segment], block_tokens: int) -> tuple[NDArray[np.int64], int]:
    written: list[NDArray[np.int64]] = []
    blank: list[NDArray[np.int64]] = []
    for segment in segments:
        end = segment.start + segment.count
        written.append(_key_rows(segment, segment.start, end, block_tokens))
        last_block = (end - 1) // block_tokens * block_tokens
        if last_block >= segment.start and end % block_tokens:  # this step begins the block and does not fill it
            blank.append(_key_rows(segment, end, last_block + block_tokens, block_tokens))
    keys = np.concatenate(written, axis=1)
    parts = [keys, keys + block_tokens]
    for rows in blank:
        parts += [rows, rows + block_tokens]
    return np.concatenate(parts, axis=1), 2 * sum(rows.shape[1] for rows in blank)


def _key_rows(segment: Segment, first: int, end: int, block_tokens: int) -> NDArray[np.int64]:
    """[layers, end - first] token rows of K of positions first .. end - 1; V lies `block_tokens` rows further."""
    if end - first == 1:
        block, slot = divmod(first, block_tokens)
        pages = segment.table.ids[:, block : block + 1].astype(np.int64)
        return pages * (2 * block_tokens) + slot
    at = np.arange(first, end)
    pages = segment.table.ids[:, at // block_tokens].astype(np.int64)
    rows: NDArray[np.int64] = pages * (2 * block_tokens) + at % block_tokens
    return rows


def decode_groups(
    batch: FlatBatch, window_tokens: int | None, block_tokens: int, dtype: torch.dtype
) -> list[DecodeGroup]:
    """Decoding sequences by length, so that padding at most doubles what is read, in groups of GROUP_KEYS at the most."""
    spans = [_span(segment, window_tokens, block_tokens) for segment in batch.decodes]
    order = sorted(range(len(spans)), key=lambda row: -spans[row].blocks)
    groups: list[list[int]] = []
    for row in order:
        longest = spans[groups[-1][0]].blocks if groups else 0
        too_many = bool(groups) and (len(groups[-1]) + 1) * longest * block_tokens > GROUP_KEYS
        if not groups or too_many or 2 * spans[row].blocks < longest:
            groups.append([])
        groups[-1].append(row)
    whole = len(groups) == 1 and not batch.prefills
    device = batch.ids.device
    found: list[DecodeGroup] = []
    for rows in groups:
        chosen = range(len(spans)) if whole else rows
        ids, mask = _padded([spans[row] for row in chosen], block_tokens)
        found.append(
            DecodeGroup(
                rows=None if whole else torch.tensor(rows, device=device),
                halves=_halves(ids, device),
                mask=_to(mask, device).to(dtype),
            )
        )
    return found


def prefill_runs(batch: FlatBatch, window_tokens: int | None, block_tokens: int) -> list[PrefillRun]:
    """One run per prefilling segment, from the first block that one of its tokens sees."""
    found: list[PrefillRun] = []
    row = len(batch.decodes)
    for segment in batch.prefills:
        span = _span(segment, window_tokens, block_tokens)
        found.append(
            PrefillRun(
                rows=slice(row, row + segment.count),
                halves=_halves(span.ids, batch.ids.device),
                keys=span.end - span.first_key,
            )
        )
        row += segment.count
    return found


@dataclass(frozen=True, slots=True)
class _Span:
    """The blocks of one sequence that a segment's tokens see, and which keys of them."""

    ids: NDArray[np.int32]
    first_key: int
    """Position of the first key of the first block."""
    first_seen: int
    """Position of the first key the last token sees."""
    end: int

    @property
    def blocks(self) -> int:
        return self.ids.shape[1]


def _span(segment: Segment, window_tokens: int | None, block_tokens: int) -> _Span:
    end = segment.start + segment.count
    first_needed = 0 if window_tokens is None else max(0, segment.start - window_tokens + 1)
    first_block = first_needed // block_tokens
    ids = segment.table.ids[:, first_block : -(-end // block_tokens)]
    first_seen = 0 if window_tokens is None else max(0, end - window_tokens)
    return _Span(ids, first_block * block_tokens, first_seen, end)


def _padded(spans: Sequence[_Span], block_tokens: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Page ids [layers, sequences, blocks], padded with each sequence's last page, and the mask [sequences, keys]."""
    blocks = max(span.blocks for span in spans)
    ids = np.empty((spans[0].ids.shape[0], len(spans), blocks), dtype=np.int32)
    for row, span in enumerate(spans):
        ids[:, row, : span.blocks] = span.ids
        ids[:, row, span.blocks :] = span.ids[:, -1:]
    first_keys = np.array([span.first_key for span in spans])[:, None]
    at = first_keys + np.arange(blocks * block_tokens)
    first_seen = np.array([span.first_seen for span in spans])[:, None]
    ends = np.array([span.end for span in spans])[:, None]
    seen = (at >= first_seen) & (at < ends)
    return ids, np.where(seen, np.float32(0.0), np.float32(-np.inf))


def _halves(ids: NDArray[np.int32], device: torch.device) -> Tensor:
    """Page ids [layers, ...] -> half pages [layers, 2, ...]."""
    keys = 2 * ids.astype(np.int64)
    return _to(np.stack((keys, keys + 1), axis=1), device)


def _to(array: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)
