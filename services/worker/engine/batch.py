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


@dataclass(frozen=True, slots=True)
class Placed:
    """A segment, and the row of the flat batch where it begins."""

    row: int
    segment: Segment

    @property
    def rows(self) -> slice:
        """All its rows."""
        return slice(self.row, self.row + self.segment.count)


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """All tokens of a step, one after the other; decoding segments first."""

    ids: Tensor
    """[tokens] int64."""
    positions: Tensor
    """[tokens] int64, of each token in its own sequence."""
    write_rows: Tensor
    """[layers, tokens + blank_rows] int64: token rows (kernels.pages), then rows to blank."""
    blank_rows: int
    """Rows of newly begun blocks behind their last token. Blanked, so that whatever the memory held before cannot
    reach a masked product: 0 * NaN is NaN."""
    decodes: tuple[Placed, ...]
    prefills: tuple[Placed, ...]
    sample_rows: Tensor
    """[samples] int64: rows of the batch to draw a token from, in the order of the plan."""


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
    placed: list[Placed] = []
    for segment in segments:
        placed.append(Placed(len(ids), segment))
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
        decodes=tuple(placed[:n_decodes]),
        prefills=tuple(placed[n_decodes:]),
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
        written.append(_token_rows(segment, segment.start, end, block_tokens))
        last_block = (end - 1) // block_tokens * block_tokens
        if last_block >= segment.start and end % block_tokens:  # this step begins the block and does not fill it
            blank.append(_token_rows(segment, end, last_block + block_tokens, block_tokens))
    return np.concatenate(written + blank, axis=1), sum(rows.shape[1] for rows in blank)


def _token_rows(segment: Segment, first: int, end: int, block_tokens: int) -> NDArray[np.int64]:
    """[layers, end - first] token rows of positions first .. end - 1."""
    if end - first == 1:
        block, slot = divmod(first, block_tokens)
        pages = segment.table.ids[:, block : block + 1].astype(np.int64)
        return pages * block_tokens + slot
    at = np.arange(first, end)
    pages = segment.table.ids[:, at // block_tokens].astype(np.int64)
    rows: NDArray[np.int64] = pages * block_tokens + at % block_tokens
    return rows


def _to(array: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)
