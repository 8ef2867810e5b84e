"""Block tables of a step's sequences on the device. Only rows that changed are sent again."""

from collections.abc import Sequence

import numpy as np
import torch
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
        changed = [
            row
            for row, segment in enumerate(segments)
            if self._rows[row][0] is not segment.table or self._rows[row][1] != segment.table.n_blocks
        ]
        if not changed:
            return
        columns = max(segments[row].table.n_blocks for row in changed)
        self._turn = 1 - self._turn
        host = self._host[self._turn]
        count, cells = len(changed), len(changed) * columns
        host[:count] = torch.tensor(changed, dtype=torch.int32)
        grid = host[count : count + cells].numpy().reshape(count, columns)
        for place, row in enumerate(changed):
            table = segments[row].table
            grid[place, : table.n_blocks] = table.ids[0]
            self._rows[row] = (table, table.n_blocks)
        self._sent[: count + cells].copy_(host[: count + cells], non_blocking=True)
        rows, cells_sent = self._sent[:count], self._sent[count : count + cells]
        self.device[:, :columns].index_copy_(0, rows.long(), cells_sent.view(count, columns))


def layer_tables(segments: Sequence[Segment], device: torch.device) -> Tensor:
    """int32 [layers, sequences, blocks], for sequences with blocks whose pages are not neighbours."""
    columns = max(segment.table.n_blocks for segment in segments)
    layers = segments[0].table.layers
    ids = np.zeros((layers, len(segments), columns), np.int32)
    for row, segment in enumerate(segments):
        ids[:, row, : segment.table.n_blocks] = segment.table.ids
    return torch.from_numpy(ids).to(device)


def layer_slots(segments: Sequence[Segment], block_tokens: int, device: torch.device) -> Tensor:
    """int64 [layers, tokens], likewise: where the step's keys and values go."""
    places = []
    for segment in segments:
        at = np.arange(segment.start, segment.start + segment.count)
        places.append(segment.table.ids[:, at // block_tokens].astype(np.int64) * block_tokens + at % block_tokens)
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(places, axis=1))).to(device)
