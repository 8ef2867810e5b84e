"""Which marks of the engine a copy waits for: those of its own layers, as they were when it was posted."""

import queue
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
import torch

from common.ids import TransferId
from common.messages.handover import KvSpan
from kvstore.transport.copier import Copier, CopyDone, CopyJob
from kvstore.transport.device_channel import DeviceChannel
from kvstore.transport.layer_events import Marks, NoLayerEvents, layer_events
from kvstore.transport.own_pages import AcceleratorPages
from kvstore.transport.page_mover import PageMover
from kvstore.transport.staged import StagedChannel
from tests.kvstore.transport.pretended_device import CPU, DeviceParty, pretend

WAIT_S = 30


@dataclass
class Noted:
    """Marks that note who waits for them, with the number of the step that recorded them."""

    step: int = 0
    waited: list[tuple[int, tuple[int, ...] | None]] = field(default_factory=list)

    def record(self, layer: int) -> None:
        raise AssertionError("the engine's")

    def marks(self, layers: Iterable[int] | None = None) -> Marks:
        wanted = None if layers is None else tuple(layers)
        return Marks([cast("torch.cuda.Event", NotedEvent(self, self.step, wanted))])


@dataclass
class NotedEvent:
    """Of one step."""

    notes: Noted
    step: int
    layers: tuple[int, ...] | None

    def wait(self) -> None:
        self.notes.waited.append((self.step, self.layers))


@pytest.fixture
def parties(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[DeviceParty, DeviceParty, Noted]]:
    pretend(monkeypatch)
    host, guest = (DeviceParty(f"worker-{i}", i, tmp_path, on_gone=lambda peer: None) for i in (1, 2))
    notes = Noted()
    guest.own = AcceleratorPages(guest.memory.pages, notes)
    yield host, guest, notes
    guest.close()
    host.close()


@pytest.mark.parametrize("staged", [False, True])
def test_a_copy_waits_for_the_marks_that_its_layers_had_when_it_was_posted(
    parties: tuple[DeviceParty, DeviceParty, Noted], monkeypatch: pytest.MonkeyPatch, staged: bool
) -> None:
    host, guest, notes = parties
    target = guest.share.connect(host.name, host.path)
    channel = StagedChannel(guest.own) if staged else DeviceChannel(guest.own, target)
    moved: list[int] = []
    move = PageMover.move

    def noted(self: PageMover, *pages: object) -> None:
        moved.append(len(notes.waited))
        move(self, *pages)  # type: ignore[arg-type]

    monkeypatch.setattr(PageMover, "move", noted)
    spans = [KvSpan(1, 0, 2), KvSpan(0, 0, 1, 2), KvSpan(1, 0, 2)]
    for step, span in enumerate(spans):
        notes.step = step
        channel.posted(span)
    notes.step = 9
    for span in spans:
        channel.copy(span, (0, 1), (2, 3))
    channel.copy(KvSpan(0, 7, 2), (0, 1), (2, 3))
    assert notes.waited == [(0, (1,)), (1, (0, 1)), (2, (1,)), (9, (0,))]
    assert moved == [1, 2, 3, 4], "each wait comes before its copy"


def test_marks_of_copies_that_never_began_are_dropped(parties: tuple[DeviceParty, DeviceParty, Noted]) -> None:
    host, guest, notes = parties
    channel = DeviceChannel(guest.own, guest.share.connect(host.name, host.path))
    for notes.step, span in enumerate((KvSpan(0, 0, 1), KvSpan(0, 5, 1))):
        channel.posted(span)
    channel.copy(KvSpan(0, 5, 1), (0,), (2,))
    assert notes.waited == [(1, (0,))]


def test_the_copier_tells_a_channel_of_every_job_when_it_is_posted(
    parties: tuple[DeviceParty, DeviceParty, Noted],
) -> None:
    host, guest, notes = parties
    ends: queue.SimpleQueue[CopyDone] = queue.SimpleQueue()
    copier = Copier(ends.put)
    copier.attach(host.name, DeviceChannel(guest.own, guest.share.connect(host.name, host.path)))
    for step in range(3):
        notes.step = step
        copier.post(CopyJob(TransferId(step), host.name, KvSpan(0, step, 1), (step,), (step + 10,)))
    notes.step = 9
    assert all(ends.get(timeout=WAIT_S).ok for _ in range(3))
    copier.stop()
    assert [step for step, _ in notes.waited] == [0, 1, 2]
    assert torch.equal(host.rows[10:13], guest.rows[:3])


def test_blocks_that_are_stored_wait_for_everything_that_was_launched(
    parties: tuple[DeviceParty, DeviceParty, Noted],
) -> None:
    host, guest, notes = parties
    guest.own.copy_out([0], guest.share.connect(host.name, host.path), [1])
    guest.own.read([0])
    assert notes.waited == [(0, None), (0, None)]


def test_a_cpu_has_nothing_to_wait_for() -> None:
    events = layer_events(4, CPU)
    assert isinstance(events, NoLayerEvents)
    events.record(2)
    assert events.marks() == Marks()
    events.marks([2]).wait()
