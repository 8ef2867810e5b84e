"""A file of the host that a device copies to and from by itself, as long as the system lets it."""

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from common.errors import PeerFailed
from common.ids import Incarnation, WorkerId, peer_id
from common.messages.handover import KvSpan
from common.messages.liveness import Member
from kvstore.memory.page_memory import PageMemory, open_page_memory
from kvstore.transport.descriptions import PoolDescription
from kvstore.transport.pinned_mapping import PinnedMapping
from kvstore.transport.probe import OpenedChannel, open_channel
from kvstore.transport.share import Share
from kvstore.transport.shared_pages import SharedPages
from kvstore.transport.staging import StagingRing
from tests.kvstore.memory.pretended_driver import Status
from tests.kvstore.transport.pretended_device import CPU, LAYOUT, MIB, DeviceParty, PretendedDevice, pretend

WAIT_S, STORE = 30, peer_id(WorkerId("store"), Incarnation(1))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> PretendedDevice:
    return pretend(monkeypatch)


class Pair:
    """A KV store with a file, and a worker with a device."""

    def __init__(self, run_dir: Path) -> None:
        self.worker = DeviceParty("prefill-0", 2, run_dir, on_gone=lambda peer: None)
        self.file: PageMemory = open_page_memory(8 * MIB, LAYOUT, CPU)
        self.file.pages.rows[:] = 3
        self.store = Share(STORE, on_joined=lambda peer: None, on_gone=lambda peer: None)
        fields = {name: getattr(self.worker.member, name) for name in self.worker.member.__struct_fields__}
        fields |= {"id": "store", "role": "kvstore", "incarnation": 1, "share_kind": "memfd"}
        self.member = Member(**(fields | {"share_path": self.store.serve(self.file, run_dir)}))

    def open(self) -> tuple[OpenedChannel, SharedPages]:
        opened = open_channel(self.worker.member, self.member, self.worker.ways())
        assert isinstance(opened.mapping, SharedPages)
        return opened, opened.mapping

    def resize(self, n_chunks: int) -> None:
        settled = threading.Event()
        self.file.resize(n_chunks)
        self.store.resized(settled.set)
        assert settled.wait(WAIT_S)

    def close(self) -> None:
        self.worker.close()
        self.store.close()
        self.file.close()


@pytest.fixture
def pair(cuda: PretendedDevice, tmp_path: Path) -> Iterator[Pair]:
    with ExitStack() as stack:
        made = Pair(tmp_path)
        stack.callback(made.close)
        yield made


@pytest.mark.parametrize("pages", [[3, 1, 7], range(2, 40)])
def test_a_pinned_file_is_copied_to_and_from_without_buffers(
    pair: Pair, cuda: PretendedDevice, monkeypatch: pytest.MonkeyPatch, pages: list[int]
) -> None:
    opened, mapping = pair.open()
    assert (opened.report.kind, opened.report.reason) == ("shm", "")
    assert sum(cuda.pinned.values()) == pair.file.pages.rows.nbytes
    monkeypatch.delattr(StagingRing, "take_out")
    monkeypatch.delattr(StagingRing, "bring_in")
    opened.channel.copy(KvSpan(0, 0, len(pages)), list(pages), [page + 100 for page in pages])
    there = np.array(pages) + 100
    assert np.array_equal(pair.file.pages.rows[there], pair.worker.rows[list(pages)].numpy())
    others = np.setdiff1d(np.arange(len(pair.file.pages.rows)), there)
    assert (pair.file.pages.rows[others] == 3).all()
    pair.worker.own.copy_in(pages, mapping, range(len(pages)))
    assert (pair.worker.rows[list(pages)] == 3).all()


def test_a_file_that_cannot_be_pinned_is_used_through_buffers_and_says_so(pair: Pair, cuda: PretendedDevice) -> None:
    cuda.fail["cuMemHostRegister"] = Status.CUDA_ERROR_OUT_OF_MEMORY
    opened, mapping = pair.open()
    assert opened.report.kind == "shm"
    assert "through pinned buffers, because the mapping could not be pinned" in opened.report.reason
    assert "cuMemHostRegister failed with CUDA_ERROR_OUT_OF_MEMORY" in opened.report.reason
    opened.channel.copy(KvSpan(0, 0, 2), [4, 2], [9, 300])
    assert np.array_equal(pair.file.pages.rows[[9, 300]], pair.worker.rows[[4, 2]].numpy())
    pair.worker.own.copy_in([5], mapping, [0])
    assert (pair.worker.rows[5] == 3).all()


def test_pages_of_a_stretch_that_begins_later_are_found(pair: Pair) -> None:
    chunk_bytes, (_, *offsets) = pair.file.plan.chunk_bytes, pair.file.pages.chunk_offsets
    description = PoolDescription(
        peer=STORE,
        page_bytes=LAYOUT.page_bytes,
        chunk_bytes=chunk_bytes,
        chunk_offsets=tuple(offsets),
        probe_offset_bytes=0,
        probe_bytes=1,
    )
    (fd,) = pair.file.export_fds()
    mapping = SharedPages(description, fd)
    os.close(fd)
    mapping.pin(lambda pages: PinnedMapping(pair.worker.driver, pages, CPU))
    pair.worker.own.copy_out([4], mapping, [1])
    first = chunk_bytes // LAYOUT.page_bytes
    assert np.array_equal(pair.file.pages.rows[first + 1], pair.worker.rows[4].numpy())
    pair.worker.own.copy_in([6], mapping, [1])
    assert np.array_equal(pair.worker.rows[6].numpy(), pair.worker.rows[4].numpy())
    mapping.close()


def test_what_is_pinned_too_late_is_let_go_again(pair: Pair, cuda: PretendedDevice) -> None:
    cuda.fail["cuMemHostRegister"] = Status.CUDA_ERROR_OUT_OF_MEMORY
    _, mapping = pair.open()

    def too_late(pages: SharedPages) -> PinnedMapping:
        made = PinnedMapping(pair.worker.driver, pages, CPU)
        pair.worker.share.hang_up(STORE)
        assert cuda.pinned
        return made

    with pytest.raises(PeerFailed, match="not mapped any more"):
        mapping.pin(too_late)
    assert not cuda.pinned


def test_what_changes_while_it_is_pinned_is_pinned_by_the_next_use(pair: Pair, cuda: PretendedDevice) -> None:
    """Else memory that the host gave back would stay pinned."""
    cuda.fail["cuMemHostRegister"] = Status.CUDA_ERROR_OUT_OF_MEMORY
    _, mapping = pair.open()

    def overtaken(pages: SharedPages) -> PinnedMapping:
        made = PinnedMapping(pair.worker.driver, pages, CPU)
        if len(pages.description.chunk_offsets) != 2:
            pair.resize(2)
        return made

    mapping.pin(overtaken)
    assert (mapping.pinning, cuda.pinned) == (None, {})
    pair.worker.own.copy_in([1], mapping, [0])
    assert sum(cuda.pinned.values()) == pair.file.pages.rows.nbytes


def test_a_file_that_cannot_be_pinned_again_is_used_through_buffers(pair: Pair, cuda: PretendedDevice) -> None:
    _, mapping = pair.open()
    pair.resize(2)
    cuda.fail["cuMemHostRegister"] = Status.CUDA_ERROR_OUT_OF_MEMORY
    for _ in range(2):
        pair.worker.own.copy_in([5], mapping, [0])
        assert (pair.worker.rows[5] == 3).all()
        assert not cuda.pinned, "who fails once is not asked at every use"
    pair.resize(3)
    pair.worker.own.copy_in([5], mapping, [0])
    assert cuda.pinned


def test_nothing_stays_pinned_under_a_mapping_that_ends_or_changes(pair: Pair, cuda: PretendedDevice) -> None:
    _, mapping = pair.open()
    pair.resize(2)
    assert not cuda.pinned, "pinned memory would stay with the guest after the host gave it back"
    assert mapping.description.n_pages == pair.file.pages.n_pages
    pair.worker.own.copy_out([1], mapping, [mapping.description.n_pages - 1])
    assert np.array_equal(pair.file.pages.rows[-1], pair.worker.rows[1].numpy())
    assert sum(cuda.pinned.values()) == pair.file.pages.rows.nbytes, "again, by the first use"
    pair.open()
    assert cuda.pinned
    pair.worker.share.hang_up(STORE)
    assert not cuda.pinned
