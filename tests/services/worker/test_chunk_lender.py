"""What the core orders happens to real memory at once, and the engine and the core hear of it."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from torch import Tensor

from common.errors import OutOfChunks
from common.kv_layout import KvLayout
from common.units import MIB
from kvstore.memory.lending import ChunkLending
from kvstore.memory.page_memory import PageMemory, open_page_memory
from services.worker.chunk_lender import ChunkLender
from services.worker.core.actions import LendChunks, TakeBackChunks
from services.worker.core.elastic import ACTIVATIONS
from services.worker.core.spare_memory import SYSTEM
from services.worker.inbox import ChunksBack, Events

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=32, dtype="float32")


@dataclass
class Rig:
    memory: PageMemory
    lending: ChunkLending
    inbox: Events
    arenas: list[Tensor]
    lender: ChunkLender


@pytest.fixture
def rig() -> Iterator[Rig]:
    memory = open_page_memory(16 * MIB, LAYOUT)
    lending = ChunkLending(memory.pages, memory.chunks, threading.Lock())
    inbox, arenas = Events(lambda: None), list[Tensor]()
    yield Rig(memory, lending, inbox, arenas, ChunkLender(lending, inbox, use_scratch=arenas.append))
    arenas.clear()
    lending.close()
    memory.close()


def test_the_engine_gets_the_arena_after_every_change(rig: Rig) -> None:
    rig.lender.carry_out(LendChunks((5, 4), ACTIVATIONS))
    rig.lender.carry_out(LendChunks((2,), ACTIVATIONS))
    rig.lender.carry_out(TakeBackChunks((4, 2), ACTIVATIONS))
    assert [arena.numel() // rig.memory.plan.chunk_bytes for arena in rig.arenas] == [2, 3, 1]
    rig.arenas[-1].fill_(1)


def test_the_core_hears_when_memory_is_back_and_when_there_is_none(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.lender.carry_out(LendChunks((5, 4), SYSTEM))
    assert rig.lending.released_bytes == 2 * rig.memory.plan.chunk_bytes
    rig.lender.carry_out(TakeBackChunks((4,), SYSTEM))

    def none_left(*_: object) -> None:
        raise OutOfChunks("none left")

    monkeypatch.setattr(rig.memory.chunks, "refill", none_left)
    rig.lender.carry_out(TakeBackChunks((5,), SYSTEM))
    assert rig.inbox.take() == [ChunksBack((4,), ""), ChunksBack((5,), "none left")]
    assert rig.arenas == []
