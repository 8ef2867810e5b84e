"""Laws of the block tables on the device: they show what a step's sequences have, while those grow beside."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from common.ids import RequestId
from common.messages.requests import Sampling
from kvstore.index.page_table import PageTable
from services.worker.core.plan import Segment
from services.worker.engine.fused.lane import open_lane
from services.worker.engine.fused.tables import BlockTables, layer_tables

LAYERS = 2
HOST = torch.device("cpu")


class Restless(PageTable):
    """Its owner appends a block whenever somebody has looked at it."""

    grows = True

    @property
    def ids(self) -> NDArray[np.int32]:
        look = super().ids
        if self.grows:
            self.grows = False
            append(self)
            self.grows = True
        return look


def append(table: PageTable) -> None:
    first = 10 * (table.n_blocks + 1)
    table.append(np.arange(first, first + LAYERS, dtype=np.int32).reshape(1, LAYERS))


def table_of(kind: Callable[[int], PageTable], blocks: int) -> PageTable:
    table = kind(LAYERS)
    for _ in range(blocks):
        append(table)
    return table


def segment(table: PageTable) -> Segment:
    return Segment(
        request=RequestId("r"),
        tokens=[1],
        prompt_tokens=1,
        start=0,
        count=1,
        table=table,
        sampling=Sampling(max_tokens=1),
        sample=True,
    )


@pytest.mark.parametrize("kind", [PageTable, Restless])
def test_every_block_arrives_whenever_it_is_appended(kind: Callable[[int], PageTable]) -> None:
    tables = BlockTables(2, 64, HOST, open_lane(HOST))
    grown = [table_of(kind, blocks) for blocks in (3, 15)]
    for _ in range(4):
        segments = [segment(table) for table in grown]
        had = [table.n_blocks for table in grown]
        tables.update(segments)
        for row, (table, blocks) in enumerate(zip(grown, had, strict=True)):
            expected = [10 * (block + 1) for block in range(blocks)]
            assert tables.device[row, :blocks].tolist() == expected, f"{table.n_blocks} blocks by now"
        append(grown[0])


def test_tables_of_all_layers_may_grow_while_they_are_read() -> None:
    ids = layer_tables([segment(table_of(Restless, blocks)) for blocks in (3, 15)], HOST)
    assert ids[1, 0].tolist()[:3] == [11, 21, 31] and ids[1, 1].tolist()[:15] == [10 * n + 11 for n in range(15)]
