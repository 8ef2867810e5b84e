"""What a step needs on the device, in one copy: filled on the host while the step before still runs.

The host's side exists twice, so that filling one never meets the copy of the other: of two steps on their way the
first has been copied when the one after the second is filled.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.ids import RequestId
from services.worker.core.plan import Segment
from services.worker.engine.chance import uniforms
from services.worker.engine.fused.lane import Lane

_FIELDS: Mapping[str, torch.dtype] = {
    "ids": torch.int64,  # per token: what to compute, unless `pending` names a row of the tokens drawn last
    "pending": torch.int64,
    "positions": torch.int64,
    "slots": torch.int64,  # page of layer 0 * block_tokens + place; -1: a padding row
    "sample_rows": torch.int64,  # from here on per sequence
    "chances": torch.float64,
    "lengths": torch.int32,
    "query_starts": torch.int32,  # of prefilling sequences, one more than there are
    "top_k": torch.int32,
    "temperatures": torch.float32,
    "top_p": torch.float32,
    "min_p": torch.float32,
}
_NONE, _GREEDY = -1, 0.0
_MOST_TOP_K = 2**31 - 1
_ALIGNED_BYTES = 16

Fields = dict[str, NDArray[np.generic]]


class StepBuffers:
    """Fields of steps of up to `rows` tokens, on both sides. One thread uses them."""

    def __init__(self, rows: int, device: torch.device, lane: Lane) -> None:
        self.rows = rows
        lengths = {name: (rows + 1) * dtype.itemsize for name, dtype in _FIELDS.items()}
        ends = np.cumsum([-(-length // _ALIGNED_BYTES) * _ALIGNED_BYTES for length in lengths.values()])
        self._places = dict(zip(_FIELDS, [0, *ends[:-1].tolist()], strict=True))
        self._host = [lane.host_buffer(int(ends[-1])) for _ in range(2)]
        self._all = torch.zeros(int(ends[-1]), dtype=torch.uint8, device=device)
        self._fields: list[Fields] = [
            {name: view.numpy() for name, view in self._views(host).items()} for host in self._host
        ]
        self.device = self._views(self._all)
        """The fields on the device, at addresses that never change."""
        self._turn = 0

    def _views(self, buffer: Tensor) -> dict[str, Tensor]:
        return {
            name: buffer[self._places[name] :][: (self.rows + 1) * dtype.itemsize].view(dtype)
            for name, dtype in _FIELDS.items()
        }

    def next_host(self) -> Fields:
        """The host's fields for the next step."""
        self._turn = 1 - self._turn
        return self._fields[self._turn]

    def send(self) -> None:
        """Queue the copy of what `next_host` gave last."""
        self._all.copy_(self._host[self._turn], non_blocking=True)


def fill_rows(
    fields: Fields, segments: Sequence[Segment], decodes: int, drawn: Mapping[RequestId, int], block_tokens: int
) -> int:
    """Tokens, positions and places of a step; returns its number of tokens.

    `decodes`: how many leading segments are read as decoding ones; those behind are runs of queries, also of one.
    `drawn`: the row of each request among the tokens drawn last, for segments whose token is not known here yet.
    """
    fields["pending"].fill(_NONE)
    fields["lengths"][: len(segments)] = [segment.start + segment.count for segment in segments]
    row = 0
    for segment in segments:
        if segment.count == 1:
            _fill_one(fields, row, segment, drawn, block_tokens)
        else:
            end = row + segment.count
            at = np.arange(segment.start, segment.start + segment.count)
            fields["ids"][row:end] = segment.tokens[segment.start : segment.start + segment.count]
            fields["positions"][row:end] = at
            fields["slots"][row:end] = segment.table.ids[0, at // block_tokens] * block_tokens + at % block_tokens
        row += segment.count
    runs = [0, *(segment.count for segment in segments[decodes:])]
    fields["query_starts"][: len(runs)] = np.cumsum(runs)
    return row


def _fill_one(fields: Fields, row: int, segment: Segment, drawn: Mapping[RequestId, int], block_tokens: int) -> None:
    start = segment.start
    if segment.pending:
        fields["ids"][row], fields["pending"][row] = 0, drawn[segment.request]
    else:
        fields["ids"][row] = segment.tokens[start]
    fields["positions"][row] = start
    block, place = divmod(start, block_tokens)
    fields["slots"][row] = segment.table.first_page(block) * block_tokens + place


def pad_rows(fields: Fields, n_rows: int, until: int) -> None:
    """Rows that a captured graph computes for nobody: they write nothing."""
    fields["ids"][n_rows:until] = 0
    fields["positions"][n_rows:until] = 0
    fields["slots"][n_rows:until] = _NONE


def pad_sequences(fields: Fields, n_sequences: int, n_rows: int, until: int) -> None:
    """Sequences that a captured graph computes for nobody: they see nothing. `n_rows`: where their runs would begin."""
    fields["lengths"][n_sequences:until] = 0
    fields["query_starts"][n_sequences + 1 : until + 1] = n_rows


def pad_draws(fields: Fields, n_drawn: int, until: int) -> None:
    """Tokens that a captured graph draws for nobody."""
    fields["sample_rows"][n_drawn:until] = 0
    fields["temperatures"][n_drawn:until] = _GREEDY


def fill_sampling(fields: Fields, segments: Sequence[Segment]) -> int:
    """How the tokens are drawn, one row per segment that draws one; returns how many those are."""
    row = count = 0
    drawing: list[int] = []
    chosen: list[Segment] = []
    for segment in segments:
        row += segment.count
        if segment.sample:
            fields["sample_rows"][count] = row - 1
            if segment.sampling.temperature > 0.0:
                drawing.append(count)
                chosen.append(segment)
            count += 1
    fields["temperatures"][:count] = _GREEDY
    if not drawing:
        return count
    asked = [segment.sampling for segment in chosen]
    fields["temperatures"][drawing] = [one.temperature for one in asked]
    fields["top_k"][drawing] = [min(one.top_k or 0, _MOST_TOP_K) for one in asked]
    fields["top_p"][drawing] = [one.top_p for one in asked]
    fields["min_p"][drawing] = [one.min_p for one in asked]
    fields["chances"][drawing] = uniforms([one.seed for one in asked], [segment.output_position for segment in chosen])
    return count
