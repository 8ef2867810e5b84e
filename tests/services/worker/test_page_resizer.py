"""Memory changes in small portions; the engine and the peers know before the core does; what fails says why."""

from collections.abc import Callable

import pytest
from torch import Tensor

from common.kv_layout import KvLayout
from common.units import MIB
from kvstore.memory import page_memory
from kvstore.memory.available import Available
from kvstore.memory.page_memory import PageMemory, open_page_memory
from services.worker.inbox import Events, MemoryChanged
from services.worker.page_resizer import PageResizer

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=32, dtype="float32")
CHUNK = 2 * MIB // LAYOUT.page_bytes


class Rig:
    """A resizer over real memory, whose peers follow when the test says so."""

    def __init__(self) -> None:
        self.memory: PageMemory = open_page_memory(16 * MIB, LAYOUT)
        self.inbox = Events(lambda: None)
        self.views: list[Tensor] = []
        self.telling: list[Callable[[], None]] = []
        self.resizer = PageResizer(self.memory, self.inbox, use_pages=self.views.append, tell_peers=self.telling.append)

    def turns(self) -> int:
        """Until nothing is left to do."""
        count = 0
        while self.resizer.busy:
            self.resizer.turn()
            count += 1
        return count


@pytest.fixture
def rig():
    made = Rig()
    yield made
    made.memory.close()


@pytest.mark.parametrize("chunks", [1, 3, 8, 14])
def test_the_core_hears_of_it_when_engine_and_peers_have_followed(rig: Rig, chunks: int) -> None:
    rig.resizer.order(chunks * CHUNK - 1)
    rig.turns()
    assert rig.memory.pages.n_pages == len(rig.views[-1]) == chunks * CHUNK
    assert rig.inbox.take() == []
    rig.telling.pop()()
    assert rig.inbox.take() == [MemoryChanged(chunks * CHUNK, "")]


def test_no_turn_does_more_than_a_portion(rig: Rig) -> None:
    rig.resizer.order(18 * CHUNK)
    rig.resizer.turn()
    assert rig.memory.pages.n_pages == 12 * CHUNK
    assert rig.turns() == 2
    rig.resizer.order(CHUNK)
    assert rig.turns() == 5


def test_what_there_is_no_room_for_is_refused_before_anything_is_taken(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_memory, "_free_memory", lambda device: Available(10 * MIB, "the limit"))
    rig.resizer.order(14 * CHUNK)
    assert not rig.resizer.busy and not rig.telling
    (news,) = rig.inbox.take()
    assert isinstance(news, MemoryChanged) and news.n_pages == 8 * CHUNK
    assert "12.0 MiB more asked for; 10.0 MiB are available" in news.problem


def test_what_was_reached_before_others_took_the_rest_stays(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.resizer.order(18 * CHUNK)
    rig.resizer.turn()
    monkeypatch.setattr(page_memory, "_free_memory", lambda device: Available(0, "the limit"))
    rig.turns()
    assert len(rig.views[-1]) == 12 * CHUNK
    rig.telling.pop()()
    (news,) = rig.inbox.take()
    assert isinstance(news, MemoryChanged) and news.n_pages == 12 * CHUNK and "the limit" in news.problem
