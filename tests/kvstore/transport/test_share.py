"""Sharing page memory between the two ends, here in one process; see test_share_deaths.py for two."""

import os
import queue
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

from common.errors import PeerFailed
from common.ids import Incarnation, PeerId, WorkerId, peer_id
from common.kv_layout import KvLayout
from common.messages.handover import KvSpan, Probed
from common.messages.liveness import Member, TransportReport
from kvstore.memory.page_memory import PageMemory, open_page_memory
from kvstore.transport import share as share_module
from kvstore.transport.descriptions import MappedPages, PoolDescription
from kvstore.transport.guest import ChunkMapper, Visited, visit
from kvstore.transport.own_pages import HostPages
from kvstore.transport.probe import TcpProbe, Ways, answer_probe, open_channel
from kvstore.transport.share import Share
from kvstore.transport.share_wire import Introduce, ProbeWritten, encode_frame
from kvstore.transport.shared_pages import SharedPages
from kvstore.transport.socket_path import short_name

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=32, dtype="float32")
HOST, GUEST = peer_id(WorkerId("decode-0"), Incarnation(1)), peer_id(WorkerId("prefill-0"), Incarnation(2))
WAIT_S, MIB = 30, 2**20
News = queue.SimpleQueue[tuple[str, PeerId]]


class ManualClock:
    """Stands still until it is advanced."""

    def __init__(self) -> None:
        self._now_ms = 0.0

    def now_ms(self) -> float:
        return self._now_ms

    def advance(self, passed_ms: float) -> None:
        self._now_ms += passed_ms


class Party:
    """One end: its memory, its share, and what it heard."""

    def __init__(self, name: PeerId, run_dir: Path) -> None:
        self.name, self.news = name, News()
        self.memory: PageMemory = open_page_memory(4 * MIB, LAYOUT)
        self.share = Share(
            name,
            on_joined=lambda peer: self.news.put(("joined", peer)),
            on_gone=lambda peer: self.news.put(("gone", peer)),
        )
        self.path = self.share.serve(self.memory, run_dir)

    def heard(self) -> tuple[str, PeerId]:
        return self.news.get(timeout=WAIT_S)

    def close(self) -> None:
        self.share.close()
        self.memory.close()

    def ways(self, wanted: str = "auto") -> Ways:
        return Ways(HostPages(self.memory.pages), self.share, wanted)

    def member(self, worker: str, incarnation: int, host: str = "here") -> Member:
        return Member(
            id=WorkerId(worker),
            role="decode",
            incarnation=Incarnation(incarnation),
            endpoint="",
            host=host,
            pid=os.getpid(),
            share_path=self.path,
        )


@pytest.fixture
def parties(tmp_path: Path) -> Iterator[Callable[[PeerId], Party]]:
    with ExitStack() as stack:

        def make(name: PeerId) -> Party:
            made = Party(name, tmp_path)
            stack.callback(made.close)
            return made

        yield make


def test_what_a_guest_writes_is_in_the_hosts_pages(parties: Callable[[PeerId], Party]) -> None:
    host, guest = parties(HOST), parties(GUEST)
    host.memory.pages.shrink(2)
    host.memory.pages.grow(2)
    target = guest.share.connect(HOST, host.path)
    assert target.description.n_pages == host.memory.pages.n_pages
    for page in (0, host.memory.pages.n_pages - 1):
        target.write([page], np.full((1, LAYOUT.page_bytes), page % 251, np.uint8), [0])
        assert (host.memory.pages.rows[page] == page % 251).all()


def test_the_probe_leaves_no_memory_behind(parties: Callable[[PeerId], Party]) -> None:
    host, guest = parties(HOST), parties(GUEST)
    before_bytes = host.memory.backend.resident_bytes
    target = guest.share.connect(HOST, host.path)
    assert target.gib_per_s > 0
    assert host.memory.backend.resident_bytes == before_bytes


def test_both_ends_hear_of_an_end_exactly_once(parties: Callable[[PeerId], Party]) -> None:
    host, guest = parties(HOST), parties(GUEST)
    target = guest.share.connect(HOST, host.path)
    assert host.heard() == ("joined", GUEST)
    host.share.close()
    assert guest.heard() == ("gone", HOST)
    with pytest.raises(PeerFailed, match="not mapped any more"):
        target.read([0])
    assert guest.news.empty()
    assert host.news.empty()


def test_hanging_up_unmaps_first_and_is_news_for_the_host_only(parties: Callable[[PeerId], Party]) -> None:
    host, guest = parties(HOST), parties(GUEST)
    target = guest.share.connect(HOST, host.path)
    assert host.heard() == ("joined", GUEST)
    guest.share.hang_up(HOST)
    assert target.closed
    assert host.heard() == ("gone", GUEST)
    again = guest.share.connect(HOST, host.path)
    assert host.heard() == ("joined", GUEST)
    assert not again.closed
    assert guest.news.empty()


def test_a_guest_with_two_connections_is_gone_with_the_last(parties: Callable[[PeerId], Party]) -> None:
    host, guest = parties(HOST), parties(GUEST)
    other = Share(GUEST, on_joined=lambda peer: None, on_gone=lambda peer: None)
    guest.share.connect(HOST, host.path)
    other.connect(HOST, host.path)
    assert [host.heard(), host.heard()] == [("joined", GUEST)] * 2
    other.close()
    parties(peer_id(WorkerId("third"), Incarnation(3))).share.connect(HOST, host.path)
    assert host.heard()[0] == "joined"  # so the end of `other` has been seen, and was no news
    guest.share.hang_up(HOST)
    assert host.heard() == ("gone", GUEST)


def test_of_two_overlapping_connections_to_one_host_one_is_left(
    parties: Callable[[PeerId], Party], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, guest = parties(HOST), parties(GUEST)
    mapped: list[MappedPages] = []

    def visit_twice(self_id: PeerId, peer: PeerId, path: str, mapper: ChunkMapper | None) -> Visited:
        """While the outer connection is being made, another one comes about."""
        monkeypatch.setattr(share_module, "visit", visit)
        visited = visit(self_id, peer, path)
        mapped.append(guest.share.connect(peer, path))
        return visited

    monkeypatch.setattr(share_module, "visit", visit_twice)
    kept = guest.share.connect(HOST, host.path)
    assert [host.heard(), host.heard()] == [("joined", GUEST)] * 2
    assert mapped[0].closed
    assert not kept.closed
    host.share.close()
    assert guest.heard() == ("gone", HOST)
    assert guest.news.empty()
    assert kept.closed


def test_hanging_up_one_mapping_leaves_the_one_that_replaced_it(parties: Callable[[PeerId], Party]) -> None:
    host, guest = parties(HOST), parties(GUEST)
    old = guest.share.connect(HOST, host.path)
    new = guest.share.connect(HOST, host.path)
    guest.share.hang_up(HOST, old)
    assert not new.closed
    guest.share.hang_up(HOST, new)
    assert new.closed


def test_a_closed_share_maps_nothing(parties: Callable[[PeerId], Party], monkeypatch: pytest.MonkeyPatch) -> None:
    host, guest = parties(HOST), parties(GUEST)
    mapped: list[MappedPages] = []

    def visit_late(self_id: PeerId, peer: PeerId, path: str, mapper: ChunkMapper | None) -> Visited:
        visited = visit(self_id, peer, path)
        mapped.append(visited.pages)
        guest.share.close()
        return visited

    monkeypatch.setattr(share_module, "visit", visit_late)
    with pytest.raises(PeerFailed, match="closing"):
        guest.share.connect(HOST, host.path)
    assert mapped[0].closed


def test_a_guest_that_never_introduces_itself_is_closed_and_the_others_are_not(tmp_path: Path) -> None:
    clock = ManualClock()
    memory = open_page_memory(4 * MIB, LAYOUT)
    host = Share(HOST, on_joined=lambda peer: None, on_gone=lambda peer: None, clock=clock)
    guest = Share(GUEST, on_joined=lambda peer: None, on_gone=lambda peer: None)
    path = host.serve(memory, tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.settimeout(WAIT_S)
        with short_name(Path(path)) as name:
            stranger.connect(name)
        pages = guest.connect(HOST, path)  # accepted after the stranger
        clock.advance(60_000.0)
        other = Share(PeerId("third@3"), on_joined=lambda peer: None, on_gone=lambda peer: None)
        other.connect(HOST, path)  # wakes the host
        assert stranger.recv(1) == b""
    assert not pages.closed
    for share in (other, guest, host):
        share.close()
    memory.close()


def test_another_incarnation_than_expected_is_refused(parties: Callable[[PeerId], Party]) -> None:
    host, guest = parties(HOST), parties(GUEST)
    newer = peer_id(WorkerId("decode-0"), Incarnation(9))
    with pytest.raises(PeerFailed, match=f"{HOST} listens where {newer} was expected"):
        guest.share.connect(newer, host.path)


def test_a_path_that_nobody_serves_is_the_peers_failure(parties: Callable[[PeerId], Party], tmp_path: Path) -> None:
    with pytest.raises(PeerFailed, match="cannot reach the memory"):
        parties(GUEST).share.connect(HOST, str(tmp_path / "nobody"))


@pytest.mark.parametrize(
    "rubbish",
    [b"\xff" * 64, b"\x04\0\0\0abcd", encode_frame(ProbeWritten(n_bytes=5)), encode_frame(Introduce(peer=GUEST)) * 2],
)
def test_rubbish_ends_the_connection_and_hurts_nobody_else(parties: Callable[[PeerId], Party], rubbish: bytes) -> None:
    host, guest = parties(HOST), parties(GUEST)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.settimeout(WAIT_S)
        with short_name(Path(host.path)) as name:
            stranger.connect(name)
        stranger.sendall(rubbish)
        while stranger.recv(65536):
            pass
    assert guest.share.connect(HOST, host.path).gib_per_s > 0


def test_the_socket_is_private_and_removed_on_close(tmp_path: Path) -> None:
    party = Party(HOST, tmp_path)
    folder = Path(party.path).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    party.close()
    assert not folder.exists()


def test_a_folder_of_any_length_will_do(tmp_path: Path) -> None:
    memory = open_page_memory(4 * MIB, LAYOUT)
    long = tmp_path / ("x" * 120)
    host = Share(HOST, on_joined=lambda peer: None, on_gone=lambda peer: None)
    guest = Share(GUEST, on_joined=lambda peer: None, on_gone=lambda peer: None)
    path = host.serve(memory, long)
    assert len(path) > 107
    assert guest.connect(HOST, path).gib_per_s > 0
    guest.close()
    host.close()
    memory.close()


def test_a_description_that_does_not_fit_its_file_is_refused() -> None:
    memory = open_page_memory(4 * MIB, LAYOUT)
    good = PoolDescription(
        peer=HOST, page_bytes=8192, chunk_bytes=2 * MIB, chunk_offsets=(0, 2 * MIB), probe_offset_bytes=0, probe_bytes=1
    )
    SharedPages(good, memory.backend.fd).close()
    for bad in (
        {"chunk_offsets": (0, 2**40)},
        {"chunk_offsets": (-4096,)},
        {"chunk_offsets": (100,)},
        {"page_bytes": 0},
        {"page_bytes": 5000},
        {"probe_offset_bytes": 2**40},
    ):
        fields = {name: getattr(good, name) for name in good.__struct_fields__} | bad
        with pytest.raises(PeerFailed, match="do not fit"):
            SharedPages(PoolDescription(**fields), memory.backend.fd)
    memory.close()


def test_where_shared_memory_works_it_is_taken_and_copies_arrive(parties: Callable[[PeerId], Party]) -> None:
    host, guest = parties(HOST), parties(GUEST)
    mine, theirs = guest.member("prefill-0", 2), host.member("decode-0", 1)
    opened = open_channel(mine, theirs, guest.ways())
    assert (opened.report.kind, opened.report.reason, opened.report.peer) == ("shm", "", HOST)
    guest.memory.pages.rows[[3, 9]] = np.array([[33], [99]], np.uint8)
    assert opened.channel.copy(KvSpan(0, 0, 2), (3, 9), (100, 7)).payload is None
    assert host.memory.pages.rows[100].tolist() == [33] * LAYOUT.page_bytes
    assert host.memory.pages.rows[7].tolist() == [99] * LAYOUT.page_bytes
    with pytest.raises(PeerFailed, match="were asked for"):
        opened.channel.copy(KvSpan(0, 0, 1), (0,), (host.memory.pages.n_pages,))
    opened.channel.close()


def test_elsewhere_tcp_is_taken_and_says_why(parties: Callable[[PeerId], Party]) -> None:
    host, guest = parties(HOST), parties(GUEST)
    mine = guest.member("prefill-0", 2)
    for theirs, wanted, why in (
        (host.member("decode-0", 1), "tcp", "chosen by"),
        (host.member("decode-0", 1, host="there"), "auto", r"another host \(there, not here\)"),
        (host.member("decode-0", 7), "auto", "listens where"),
    ):
        opened = open_channel(mine, theirs, guest.ways(wanted))
        assert (opened.channel.kind, opened.report.kind) == ("tcp", "tcp")
        assert re.search(why, opened.report.reason)
    with pytest.raises(PeerFailed, match="--transport=shm does not work"):
        open_channel(mine, host.member("decode-0", 7), guest.ways("shm"))


def test_the_tcp_probe_measures_only_what_arrived_whole() -> None:
    opened = TransportReport(peer=HOST, kind="tcp", gib_per_s=0.0, reason="far away")
    probe = TcpProbe(opened, nonce=77, now_ms=100.0)
    message, payloads = probe.message
    report = probe.on_probed(answer_probe(message, payloads), now_ms=104.0)
    assert (report.kind, report.reason) == ("tcp", "far away")
    assert report.gib_per_s == pytest.approx(4 / 1024 / 0.004, abs=1e-3)
    for wrong in (Probed(nonce=77, crc32=0), Probed(nonce=78, crc32=answer_probe(message, payloads).crc32)):
        with pytest.raises(PeerFailed, match="another payload"):
            probe.on_probed(wrong, now_ms=104.0)


class NothingYet:
    """Memory whose pages are not numbered yet."""

    pages_in_file = None
    probe_offset_bytes = 0

    def export_fds(self) -> list[int]:
        raise AssertionError("there is nothing to hand out")

    def discard(self, offset_bytes: int, length_bytes: int) -> None:
        raise AssertionError("there is nothing to discard")


def test_a_host_without_pages_says_so_and_can_serve_later(tmp_path: Path) -> None:
    news = News()
    host = Share(HOST, on_joined=lambda peer: news.put(("joined", peer)), on_gone=lambda peer: news.put(("gone", peer)))
    guest = Share(GUEST, on_joined=lambda peer: None, on_gone=lambda peer: None)
    path = host.serve(NothingYet(), tmp_path)
    with pytest.raises(PeerFailed, match=r"shares no memory: .*no pages yet"):
        guest.connect(HOST, path)
    assert news.get(timeout=WAIT_S) == ("joined", GUEST)
    assert news.get(timeout=WAIT_S) == ("gone", GUEST)
    guest.close()
    host.close()


def test_a_file_whose_descriptor_cannot_be_made_ends_one_connection_with_the_reason(
    parties: Callable[[PeerId], Party], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, guest = parties(HOST), parties(GUEST)

    def no_more(*_: int) -> list[int]:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(host.memory, "export_fds", no_more)
        with pytest.raises(PeerFailed, match=r"shares no memory: .*cannot answer Introduce: .*Too many open files"):
            guest.share.connect(HOST, host.path)
    assert [host.heard(), host.heard()] == [("joined", GUEST), ("gone", GUEST)]
    assert not guest.share.connect(HOST, host.path).closed


def test_what_ends_the_shares_thread_is_passed_on(tmp_path: Path) -> None:
    died: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def broken(peer: PeerId) -> None:
        raise ValueError(f"our own bug with {peer}")

    memory = open_page_memory(4 * MIB, LAYOUT)
    host = Share(HOST, on_joined=broken, on_gone=lambda peer: None, on_died=died.put)
    with closing(memory), closing(host), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        with short_name(Path(host.serve(memory, tmp_path))) as name:
            connection.connect(name)
        connection.sendall(encode_frame(Introduce(peer=GUEST)))
        assert str(died.get(timeout=WAIT_S)) == f"our own bug with {GUEST}"


def test_a_process_without_descriptors_reaches_nobody_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(*_: object) -> socket.socket:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket, "socket", no_more)
    with pytest.raises(PeerFailed, match="Too many open files"):
        visit(GUEST, HOST, "nowhere")
