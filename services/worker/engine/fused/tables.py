"""Block tables of a step's sequences on the device. Only rows that changed are sent again."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore.index.page_table import PageTable
from services.worker.core.plan import Segment
from services.worker.engine.fused.lane import Lane


class BlockTables:
    """int32 [sequences, blocks] at an address that never changes: the first page of every block.

    Row i is the step's i-th sequence. One thread uses it; of the host's buffers there are two, as of StepBuffers.
    """

    def __init__(self, sequences: int, blocks: int, device: torch.device, lane: Lane) -> None:
        self.device = torch.zeros(sequences, blocks, dtype=torch.int32, device=device)
        self._rows: list[tuple[PageTable | None, int]] = [(None, 0)] * sequences
        n_bytes = sequences * (blocks + 2) * 4
        self._host = [lane.host_buffer(n_bytes).view(torch.int32) for _ in range(2)]
        self._sent = torch.zeros(n_bytes // 4, dtype=torch.int32, device=device)
        self._turn = 0

    def update(self, segments: Sequence[Segment]) -> None:
        """Queue what it takes to make row i the table of segment i."""
        changed: list[int] = []
        pages: list[NDArray[np.int32]] = []
        for row, segment in enumerate(segments):
            table, first = segment.table, segment.table.ids[0]  # one look: the table may grow meanwhile
            if self._rows[row][0] is not table or self._rows[row][1] != first.size:
                changed.append(row)
                pages.append(first)
                self._rows[row] = (table, first.size)
        if not changed:
            return
        columns = max(first.size for first in pages)
        self._turn = 1 - self._turn
        host = self._host[self._turn]
        count, cells = len(changed), len(changed) * columns
        host[:count] = torch.tensor(changed, dtype=torch.int32)
        grid = host[count : count + cells].numpy().reshape(count, columns)
        for place, first in enumerate(pages):
            grid[place, : first.size] = first
        self._sent[: count + cells].copy_(host[: count + cells], non_blocking=True)
        rows, cells_sent = self._sent[:count], self._sent[count : count + cells]
        self.device[:, :columns].index_copy_(0, rows.long(), cells_sent.view(count, columns))


def layer_tables(segments: Sequence[Segment], device: torch.device) -> Tensor:
    """int32 [layers, sequences, blocks], for sequences with blocks whose pages are not neighbours."""
    looks = [segment.table.ids for segment in segments]  # one each: tables may grow meanwhile
    ids = np.zeros((looks[0].shape[0], len(looks), max(look.shape[1] for look in looks)), np.int32)
    for row, look in enumerate(looks):
        ids[:, row, : look.shape[1]] = look
    return torch.from_numpy(ids).to(device)


def layer_slots(segments: Sequence[Segment], block_tokens: int, device: torch.device) -> Tensor:
    """int64 [layers, tokens], likewise: where the step's keys and values go."""
    places = []
    for segment in segments:
        at = np.arange(segment.start, segment.start + segment.count)
        places.append(segment.table.ids[:, at // block_tokens].astype(np.int64) * block_tokens + at % block_tokens)
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(places, axis=1))).to(device)
