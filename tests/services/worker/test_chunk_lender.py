"""What the core orders happens to real memory at once, and the engine and the core hear of it."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from common.errors import OutOfChunks
from common.kv_layout import KvLayout
from common.log import Log
from common.net.fault_kit import FaultKit
from common.units import MIB
from kvstore.memory.backend import HalfMoved
from kvstore.memory.faulty import faulty_backend
from kvstore.memory.lending import ChunkLending
from kvstore.memory.page_memory import PageMemory, open_page_memory
from services.worker.chunk_lender import ChunkLender
from services.worker.core.actions import LendChunks, TakeBackChunks
from services.worker.core.elastic import ACTIVATIONS
from services.worker.core.spare_memory import SYSTEM
from services.worker.inbox import ChunksBack, Events

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=32, dtype="float32")


class Hasty:
    """A clock by which a file of rules is looked at whenever it may have changed."""

    def __init__(self) -> None:
        self._ms = 0.0

    def now_ms(self) -> float:
        self._ms += 1000.0
        return self._ms


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


def test_the_core_is_not_told_that_nothing_moved_when_something_did(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OutOfChunks("no more mappings")

    rig.lender.carry_out(LendChunks((7, 5, 3), ACTIVATIONS))
    monkeypatch.setattr(rig.memory.backend, "map_run", full)
    with pytest.raises(HalfMoved):
        rig.lender.carry_out(TakeBackChunks((5, 3), ACTIVATIONS))


@pytest.mark.parametrize(
    ("before", "order", "call"),
    [
        ([], LendChunks((7, 5, 3), ACTIVATIONS), "unmap"),
        ([], LendChunks((7, 5, 3), ACTIVATIONS), "map"),
        ([LendChunks((7, 5, 3), ACTIVATIONS)], TakeBackChunks((5, 3), ACTIVATIONS), "unmap"),
        ([LendChunks((7, 5, 3), ACTIVATIONS)], TakeBackChunks((5, 3), ACTIVATIONS), "map"),
        ([], LendChunks((6, 4), SYSTEM), "unmap"),
        ([LendChunks((6, 4), SYSTEM)], TakeBackChunks((6, 4), SYSTEM), "refill"),
        ([LendChunks((6, 4), SYSTEM)], TakeBackChunks((6, 4), SYSTEM), "map"),
    ],
)
def test_a_call_that_fails_at_any_place_of_an_order_leaves_all_as_it_was_and_is_told(
    before: list[LendChunks | TakeBackChunks], order: LendChunks | TakeBackChunks, call: str, tmp_path: Path
) -> None:
    for place in range(4):
        rules = tmp_path / f"rules-{place}"
        kit = FaultKit(f"@{rules}", "decode-0", Log(), clock=Hasty())
        memory = open_page_memory(16 * MIB, LAYOUT, wrap=lambda backend, kit=kit: faulty_backend(backend, kit))
        lending = ChunkLending(memory.pages, memory.chunks, threading.Lock())
        inbox, arenas = Events(lambda: None), list[Tensor]()
        lender = ChunkLender(lending, inbox, use_scratch=arenas.append)
        assert [lender.carry_out(one) for one in before] == [""] * len(before)
        was = memory.backend.live_mappings, len(arenas)
        rules.write_text(f"memory:fail peer={call} after={place} times=1")
        problem = lender.carry_out(order)
        told = [one.problem for one in inbox.take() if isinstance(one, ChunksBack)]
        failed = [one for one in (problem, *told) if one]
        assert failed in ([], [f"injected failure: {call}"])
        if failed:
            assert (memory.backend.live_mappings, len(arenas)) == was
            assert not lender.carry_out(order)
        arenas.clear()
        lending.close()
        memory.close()
        if not failed:
            assert place > 0, "it has such a call"
            return
    raise AssertionError("an order of more calls than are tried")
