"""Device pages that several processes map: every chunk arrives, nothing is left behind, changes are followed."""

import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import OutOfChunks, PeerFailed
from common.ids import PeerId
from common.messages.handover import KvSpan
from kvstore.memory.backend import VmMisuse
from kvstore.memory.cuda_driver import CudaDriver
from kvstore.memory.page_memory import open_page_memory
from kvstore.transport import guest
from kvstore.transport.cuda_pages import CudaSharedPages, Prober
from kvstore.transport.descriptions import ChunksDescription
from kvstore.transport.guest import Visited
from kvstore.transport.own_pages import HostPages
from kvstore.transport.page_mover import PageMover
from kvstore.transport.probe import Ways, open_channel
from kvstore.transport.share import Share
from kvstore.transport.share_wire import Adapted, Chunks, Mailbox, Resized, Take, close_all, encode_frame, send_frame
from tests.kvstore.memory.pretended_driver import Status
from tests.kvstore.transport.pretended_device import CPU, LAYOUT, MIB, N_CHUNKS, DeviceParty, PretendedDevice, pretend

WAIT_S = 30


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> PretendedDevice:
    return pretend(monkeypatch)


class Pair:
    """A decode worker that is host, a prefill worker that is guest, and the news of their ends."""

    def __init__(self, run_dir: Path) -> None:
        self.gone: queue.SimpleQueue[PeerId] = queue.SimpleQueue()
        self.host = DeviceParty("decode-0", 1, run_dir, on_gone=self.gone.put)
        self.guest = DeviceParty("prefill-0", 2, run_dir, on_gone=self.gone.put)

    def mapped(self) -> CudaSharedPages:
        pages = self.guest.share.connect(self.host.name, self.host.path)
        assert isinstance(pages, CudaSharedPages)
        return pages

    def resize(self, n_chunks: int) -> None:
        """The host's pool, and return when its guests have followed."""
        self.host.memory.resize(n_chunks)
        settled = threading.Event()
        self.host.share.resized(settled.set)
        assert settled.wait(WAIT_S)


@pytest.fixture
def pair(cuda: PretendedDevice, tmp_path: Path) -> Iterator[Pair]:
    with ExitStack() as stack:
        made = Pair(tmp_path)
        stack.callback(made.host.close)
        stack.callback(made.guest.close)
        yield made


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_every_chunk_arrives_and_no_descriptor_or_handle_is_left(pair: Pair, cuda: PretendedDevice) -> None:
    handles, fds, accesses = len(cuda.handles), open_fds(), cuda.calls.count("cuMemSetAccess")
    pages = pair.mapped()
    assert (pages.n_pages, pages.missing_chunks, pages.kind) == (N_CHUNKS, 0, "cuda_ipc")
    assert pages.gib_per_s > 0
    with pages.using() as rows:
        assert torch.equal(rows, pair.host.rows)
    assert len(cuda.handles) == handles, "a mapping alone keeps the memory"
    assert open_fds() == fds + 3, "the two ends of the connection, and the host's watch over the guest"
    assert cuda.calls.count("cuMemSetAccess") - accesses == 5, "scratch, each message of descriptors, the probe"


@pytest.mark.parametrize("wanted", ["auto", "cuda_ipc"])
def test_a_span_is_written_into_the_granted_pages(pair: Pair, wanted: str) -> None:
    opened = open_channel(pair.guest.member, pair.host.member, pair.guest.ways(wanted))
    assert (opened.report.kind, opened.report.reason) == ("cuda_ipc", "")
    copied = opened.channel.copy(KvSpan(0, 0, 2, 2), (3, 4, 9, 0), (40, 41, 7, 49))
    assert (copied.payload, copied.n_copies, copied.n_bytes) == (None, 3, 4 * LAYOUT.page_bytes)
    assert torch.equal(pair.host.rows[[40, 41, 7, 49]], pair.guest.rows[[3, 4, 9, 0]])
    for source, target in (((0,), (N_CHUNKS,)), ((N_CHUNKS,), (0,)), ((-1,), (0,)), ((0, 1), (0,))):
        with pytest.raises(PeerFailed):
            opened.channel.copy(KvSpan(0, 0, 1), source, target)


def test_blocks_are_fetched_from_a_peers_device(pair: Pair) -> None:
    pages = pair.mapped()
    assert pair.guest.own.copy_in([5, 6, 7], pages, [40, 41, 43]) == 2
    assert torch.equal(pair.guest.rows[[5, 6, 7]], pair.host.rows[[40, 41, 43]])


def test_all_ways_carry_the_same_bytes(pair: Pair, tmp_path: Path) -> None:
    random = np.random.default_rng(7)
    source, target = (random.permutation(N_CHUNKS)[:40] for _ in range(2))
    span, wanted = KvSpan(0, 0, 20, 2), pair.guest.rows[source].clone()
    over_ipc = open_channel(pair.guest.member, pair.host.member, pair.guest.ways())
    over_ipc.channel.copy(span, source.tolist(), target.tolist())
    assert torch.equal(pair.host.rows[target], wanted)
    over_tcp = open_channel(pair.guest.member, pair.host.member, pair.guest.ways("tcp"))
    payload = over_tcp.channel.copy(span, source.tolist(), target.tolist()).payload
    assert payload is not None
    pair.host.rows.zero_()
    pair.host.own.write(target.tolist(), payload)
    assert torch.equal(pair.host.rows[target], wanted)
    file = open_page_memory(16 * MIB, LAYOUT, CPU)
    store = Share(PeerId("store@3"), on_joined=lambda peer: None, on_gone=lambda peer: None)
    pages = pair.guest.share.connect(PeerId("store@3"), store.serve(file, tmp_path))
    pair.guest.own.copy_out(source, pages, target)
    assert torch.equal(torch.from_numpy(file.pages.rows[target]), wanted)
    pair.guest.rows.zero_()
    pair.guest.own.copy_in(source, pages, target)
    assert torch.equal(pair.guest.rows[source], wanted)
    store.close()
    file.close()


def test_what_grew_is_reached_and_what_shrank_is_unmapped(pair: Pair, cuda: PretendedDevice) -> None:
    pages, before = pair.mapped(), len(cuda.mapped)
    pair.resize(N_CHUNKS + 26)
    assert pages.n_pages == N_CHUNKS + 26
    with pages.using() as rows:
        assert torch.equal(rows, pair.host.rows)
    pair.resize(N_CHUNKS - 30)
    assert pages.n_pages == N_CHUNKS - 30
    assert len(cuda.mapped) == before - 60, "by the host and by the guest"
    with pytest.raises(PeerFailed, match="were asked for"):
        pair.guest.own.copy_out([0], pages, [N_CHUNKS - 30])
    pair.guest.own.copy_out([0], pages, [N_CHUNKS - 31])


def test_pages_that_left_and_came_back_are_mapped_anew(pair: Pair) -> None:
    """Also if the guest hears of it only when they are back."""
    pages = pair.mapped()
    with pages.using():
        settled = threading.Semaphore(0)
        for n_chunks in (N_CHUNKS - 5, N_CHUNKS):
            pair.host.memory.resize(n_chunks)
            if n_chunks == N_CHUNKS:
                pair.host.rows[-5:] = 9
        pair.host.share.resized(settled.release)
    assert settled.acquire(timeout=WAIT_S)
    with pages.using() as rows:
        assert torch.equal(rows, pair.host.rows)


def test_what_shrank_and_grew_less_is_mapped_anew_though_told_once(pair: Pair) -> None:
    pages = pair.mapped()
    pair.host.memory.resize(20)
    pair.resize(30)
    pair.guest.own.copy_out([3], pages, [25])
    assert torch.equal(pair.host.rows[25], pair.guest.rows[3]), "written to memory that the host has no more"


def test_what_stayed_is_not_mapped_again(pair: Pair, cuda: PretendedDevice) -> None:
    pages = pair.mapped()
    pair.resize(10)
    pair.resize(N_CHUNKS)
    imported = cuda.calls.count("cuMemImportFromShareableHandle")
    for n_chunks in (40, 45, 30):
        pair.host.memory.resize(n_chunks)
    pair.resize(35)
    assert cuda.calls.count("cuMemImportFromShareableHandle") == imported + 5
    with pages.using() as rows:
        assert torch.equal(rows, pair.host.rows)


@pytest.mark.long
@pytest.mark.parametrize("nth", [1, 2, 51], ids=["scratch", "first batch", "adapting"])
@pytest.mark.parametrize("problem", [OSError(24, "Too many open files"), VmMisuse("not mapped"), OutOfChunks("none")])
def test_a_descriptor_that_cannot_be_made_ends_one_connection_with_the_reason(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, nth: int, problem: Exception
) -> None:
    export, made = pair.host.driver.export_fd, 0

    def export_fd(driver: CudaDriver, handle: int) -> int:
        nonlocal made
        made += 1
        if made == nth + (nth == 51):
            raise problem
        return export(handle)

    monkeypatch.setattr(CudaDriver, "export_fd", export_fd)
    fds = open_fds()
    if nth < N_CHUNKS:
        opened = open_channel(pair.guest.member, pair.host.member, pair.guest.ways())
        assert opened.report.kind == "tcp"
        assert f"{pair.host.name} cannot answer" in opened.report.reason and str(problem) in opened.report.reason
        assert pair.gone.get(timeout=WAIT_S) == pair.guest.name
    else:
        pages = pair.mapped()
        pair.resize(N_CHUNKS + 1)
        assert {pair.gone.get(timeout=WAIT_S), pair.gone.get(timeout=WAIT_S)} == {pair.host.name, pair.guest.name}
        assert pages.closed
    assert open_fds() == fds + (nth == 51), "what the host's new chunk has"
    assert pair.mapped().n_pages == len(pair.host.memory.pages.chunks), "the next one is served"


def test_a_change_that_a_guest_cannot_follow_ends_its_connection(pair: Pair, cuda: PretendedDevice) -> None:
    pages = pair.mapped()
    pair.host.memory.resize(N_CHUNKS - 1)
    cuda.fail["cuMemUnmap"] = Status.CUDA_ERROR_INVALID_VALUE
    settled = threading.Event()
    pair.host.share.resized(settled.set)
    assert settled.wait(WAIT_S)
    assert {pair.gone.get(timeout=WAIT_S), pair.gone.get(timeout=WAIT_S)} == {pair.host.name, pair.guest.name}
    assert pages.closed
    assert pair.mapped().n_pages == N_CHUNKS - 1


def test_all_peers_are_tried_in_one_stream_and_no_buffer_is_kept(
    pair: Pair, cuda: PretendedDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    created = list[PageMover]()
    made, mapped, handles = PageMover.__init__, len(cuda.mapped), len(cuda.handles)
    monkeypatch.setattr(PageMover, "__init__", lambda mover, device: (created.append(mover), made(mover, device))[1])
    for _ in range(3):
        pair.mapped()
    assert created == []
    assert (len(cuda.mapped), len(cuda.handles)) == (mapped + N_CHUNKS + 1, handles), "its pages and its scratch"


def test_descriptors_of_one_batch_at_a_time_are_taken(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """And who gets no turn in time says so."""
    monkeypatch.setattr(guest, "_TURN_WITHIN_S", 0.01)
    with pair.guest.mapper.turn:
        opened = open_channel(pair.guest.member, pair.host.member, pair.guest.ways())
    assert opened.report.kind == "tcp" and "no turn to map" in opened.report.reason
    add, held = CudaSharedPages.add_chunks, list[bool]()
    monkeypatch.setattr(
        CudaSharedPages,
        "add_chunks",
        lambda pages, fds: (held.append(pair.guest.mapper.turn.locked()), add(pages, fds))[1],
    )
    pair.mapped()
    assert held == [True] * 3
    assert not pair.guest.mapper.turn.locked()


def test_an_answer_that_crossed_with_a_change_is_not_mapped(pair: Pair, cuda: PretendedDevice) -> None:
    """Its chunks may not be the ones that are missing now."""
    pages, memory = pair.mapped(), pair.host.memory
    mapped, fds = len(cuda.mapped), open_fds()
    here, there = socket.socketpair()
    visited = Visited(here, Mailbox(here), pages)
    fields = {name: getattr(pages.description, name) for name in pages.description.__struct_fields__}
    memory.resize(N_CHUNKS + 2)
    send_frame(there, Resized(description=ChunksDescription(**(fields | {"n_chunks": N_CHUNKS + 2, "version": 1}))))
    for first, n_chunks, answer in (
        (None, 0, Take(first=N_CHUNKS)),
        (N_CHUNKS - 1, 2, None),
        (N_CHUNKS, 0, None),
        (N_CHUNKS, 1, Take(first=N_CHUNKS + 1)),
        (N_CHUNKS + 1, 1, Adapted(version=1)),
    ):
        if first is not None:
            sent = memory.export_fds(first, n_chunks) if n_chunks else []
            send_frame(there, Chunks(first=first, n_chunks=n_chunks), sent)
            close_all(sent)
        assert visited.hear()
        there.settimeout(WAIT_S if answer else 0.0)
        if answer is None:
            with pytest.raises(BlockingIOError):
                there.recv(1)
        else:
            assert there.recv(65536) == encode_frame(answer)
    assert len(cuda.mapped) == mapped + 4, "two by the host and two by the guest"
    with pages.using() as rows:
        assert torch.equal(rows, pair.host.rows)
    assert open_fds() == fds + 2 + 2, "the handles of the host, and the two ends"
    here.close()
    there.close()


def test_a_change_waits_for_the_copy_in_progress(pair: Pair) -> None:
    pages = pair.mapped()
    pair.host.memory.resize(N_CHUNKS - 1)
    settled = threading.Event()
    with pages.using() as rows:
        pair.host.share.resized(settled.set)
        while not pages._uses._changing:
            continue
        assert not settled.is_set()
        assert rows[-1].sum() > 0, "still mapped for the one that is inside"
    assert settled.wait(WAIT_S)


def test_a_host_that_ends_is_unmapped_and_news(pair: Pair, cuda: PretendedDevice) -> None:
    pages = pair.mapped()
    pair.host.share.close()
    assert pair.gone.get(timeout=WAIT_S) == pair.host.name
    assert pages.closed
    assert len(cuda.mapped) == 2 * (N_CHUNKS + 1), "what each has itself, with its scratch"
    with pytest.raises(PeerFailed, match="not mapped any more"):
        pair.guest.own.copy_out([0], pages, [0])


@pytest.mark.parametrize(
    "call", ["cuMemImportFromShareableHandle", "cuMemMap", "cuMemSetAccess", "cuMemAddressReserve"]
)
def test_what_the_driver_refuses_is_the_reason_for_tcp_or_an_error(
    pair: Pair, cuda: PretendedDevice, call: str
) -> None:
    mapped, reserved, fds = len(cuda.mapped), len(cuda.reserved), open_fds()
    cuda.fail[call] = Status.CUDA_ERROR_INVALID_VALUE
    opened = open_channel(pair.guest.member, pair.host.member, pair.guest.ways())
    assert opened.report.kind == "tcp"
    assert f"{call} failed with CUDA_ERROR_INVALID_VALUE" in opened.report.reason
    assert pair.gone.get(timeout=WAIT_S) == pair.guest.name
    cuda.fail[call] = Status.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(PeerFailed, match="--transport=cuda_ipc does not work with decode-0"):
        open_channel(pair.guest.member, pair.host.member, pair.guest.ways("cuda_ipc"))
    assert pair.gone.get(timeout=WAIT_S) == pair.guest.name
    assert (len(cuda.mapped), len(cuda.reserved), open_fds()) == (mapped, reserved, fds)


def test_a_worker_without_a_device_says_so(pair: Pair) -> None:
    file = open_page_memory(16 * MIB, LAYOUT, CPU)
    share = Share(PeerId("prefill-1@3"), on_joined=lambda peer: None, on_gone=lambda peer: None)
    opened = open_channel(pair.guest.member, pair.host.member, Ways(HostPages(file.pages), share))
    assert (opened.report.kind, opened.channel.kind) == ("tcp", "tcp")
    assert "lie on a device, ours on the host" in opened.report.reason
    with pytest.raises(PeerFailed, match=r"shares no memory: .*lie on a device"):
        share.connect(pair.host.name, pair.host.path)
    share.close()
    file.close()


@pytest.mark.parametrize("wanted", ["shm", "cuda_ipc"])
def test_a_kind_that_was_asked_for_by_name_is_not_replaced(pair: Pair, tmp_path: Path, wanted: str) -> None:
    """But a KV store, which has no device, is reached as it can be where devices were asked for."""
    if wanted == "shm":
        with pytest.raises(PeerFailed, match=r"--transport=shm does not work with .*: it shares device memory"):
            open_channel(pair.guest.member, pair.host.member, pair.guest.ways(wanted))
        return
    file = open_page_memory(16 * MIB, LAYOUT, CPU)
    share = Share(pair.host.name, on_joined=lambda peer: None, on_gone=lambda peer: None)
    fields = {name: getattr(pair.host.member, name) for name in pair.host.member.__struct_fields__}
    fields |= {"share_path": share.serve(file, tmp_path / "other"), "share_kind": "memfd"}
    with pytest.raises(PeerFailed, match=r"--transport=cuda_ipc does not work with .*: it shares a file"):
        open_channel(pair.guest.member, type(pair.host.member)(**fields), pair.guest.ways(wanted))
    store = type(pair.host.member)(**(fields | {"role": "kvstore"}))
    assert open_channel(pair.guest.member, store, pair.guest.ways(wanted)).report.kind == "shm"
    share.close()
    file.close()


def test_descriptions_that_contradict_themselves_are_refused(pair: Pair, cuda: PretendedDevice) -> None:
    reserved = len(cuda.reserved)
    good = pair.mapped().description
    pair.guest.share.hang_up(pair.host.name)
    for bad in (
        {"page_bytes": 0},
        {"page_bytes": 5000},
        {"n_chunks": -1},
        {"n_chunks": good.capacity_chunks + 1},
        {"probe_offset_bytes": good.scratch_bytes},
    ):
        fields = {name: getattr(good, name) for name in good.__struct_fields__} | bad
        with pytest.raises(PeerFailed, match="do not fit each other"):
            CudaSharedPages(ChunksDescription(**fields), 0, pair.guest.driver, Prober(PageMover(CPU)))
    assert len(cuda.reserved) == reserved
