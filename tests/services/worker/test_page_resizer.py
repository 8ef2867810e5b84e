"""Memory changes in small portions; the engine and the peers know before the core does; what fails says why."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from common.kv_layout import KvLayout
from common.units import MIB
from kvstore.memory import page_memory
from kvstore.memory.available import Available
from kvstore.memory.backend import VmMisuse
from kvstore.memory.page_memory import PageMemory, open_page_memory
from services.worker.inbox import Events, MemoryChanged
from services.worker.page_resizer import PageResizer

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=32, dtype="float32")
CHUNK = 2 * MIB // LAYOUT.page_bytes
SOON_S = 20.0


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


class Device:
    """Memory of a device that is at rest when the test says so."""

    def __init__(self, memory: PageMemory) -> None:
        self._memory, self.rest, self.calls = memory, threading.Event(), list[str]()
        self.fails = False

    @property
    def pages(self) -> "Device":
        return self

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)

    def settle(self) -> None:
        assert self.rest.wait(SOON_S)
        if self.fails:
            raise VmMisuse("a kernel failed")

    def resize(self, n_chunks: int, *, settled: bool = False) -> int:
        self.calls.append(f"resize {n_chunks} settled {settled}")
        return self._memory.resize(n_chunks)

    def __getattr__(self, name: str) -> object:
        return getattr(self._memory if hasattr(self._memory, name) else self._memory.pages, name)


def on_device(rig: Rig) -> tuple[Device, PageResizer]:
    device = Device(rig.memory)
    resizer = PageResizer(device, rig.inbox, use_pages=rig.views.append, tell_peers=rig.telling.append)  # type: ignore[arg-type]  # it stands for both
    return device, resizer


def test_a_device_is_waited_for_before_anything_goes_but_not_by_the_loop(rig: Rig) -> None:
    device, resizer = on_device(rig)
    resizer.order(CHUNK)
    resizer.turn()
    assert not (resizer.busy or device.calls)
    device.rest.set()
    while not resizer.busy:
        continue
    resizer.turn()
    assert device.calls == ["resize 1 settled True"]
    assert len(rig.telling) == 1


def test_growing_waits_for_nothing(rig: Rig) -> None:
    device, resizer = on_device(rig)
    resizer.order(9 * CHUNK)
    resizer.turn()
    assert device.calls == ["resize 9 settled True"]


def test_a_device_that_failed_ends_the_worker(rig: Rig) -> None:
    device, resizer = on_device(rig)
    device.fails = True
    device.rest.set()
    resizer.order(CHUNK)
    while not resizer.busy:
        continue
    with pytest.raises(VmMisuse):
        resizer.turn()
    assert not device.calls
