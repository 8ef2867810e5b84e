"""What guests are told of a pool that changes, and who is waited for."""

import os
import queue
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import PeerFailed
from common.ids import PeerId
from common.kv_layout import KvLayout
from kvstore.memory.page_memory import PageMemory, open_page_memory
from kvstore.transport import process_watch
from kvstore.transport.descriptions import PoolDescription
from kvstore.transport.share import Share
from kvstore.transport.share_wire import (
    Adapted,
    Introduce,
    Mailbox,
    Offer,
    ProbeSeen,
    ProbeWritten,
    Resized,
    Take,
    close_all,
    send_frame,
)
from kvstore.transport.shared_pages import SharedPages
from kvstore.transport.socket_path import short_name
from tests.kvstore.transport.pretended_device import DeviceParty, pretend

HOST, GUEST, WAIT_S, MIB = PeerId("decode-0@1"), PeerId("prefill-0@2"), 30, 2**20
LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=32, dtype="float32")


class ManualClock:
    """Stands still until it is advanced."""

    def __init__(self) -> None:
        self._now_ms = 0.0

    def now_ms(self) -> float:
        return self._now_ms

    def advance(self, passed_ms: float) -> None:
        self._now_ms += passed_ms


class Setting:
    """A host with a file, whose clock stands still, and what it told."""

    def __init__(self, run_dir: Path) -> None:
        self.clock, self.gone, self.settled = ManualClock(), queue.SimpleQueue[PeerId](), queue.SimpleQueue[int]()
        self.memory: PageMemory = open_page_memory(8 * MIB, LAYOUT, torch.device("cpu"))
        self.share = Share(HOST, on_joined=lambda peer: None, on_gone=self.gone.put, clock=self.clock)
        self.path = self.share.serve(self.memory, run_dir)

    def resize(self, n_chunks: int) -> None:
        self.memory.resize(n_chunks)
        self.share.resized(lambda: self.settled.put(n_chunks))

    def close(self) -> None:
        self.share.close()
        self.memory.close()


@pytest.fixture
def at(tmp_path: Path) -> Iterator[Setting]:
    made = Setting(tmp_path)
    yield made
    made.close()


@contextmanager
def guest_by_hand(path: str, introduce: Introduce) -> Iterator[tuple[socket.socket, Mailbox]]:
    """A connection that says only what the test says."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        with short_name(Path(path)) as name:
            connection.connect(name)
        mailbox = Mailbox(connection)
        send_frame(connection, introduce)
        assert isinstance(mailbox.wait(WAIT_S), Offer)
        close_all(mailbox.take_fds(1))
        yield connection, mailbox


def test_without_guests_a_change_is_settled_at_once(at: Setting) -> None:
    at.resize(3)
    assert at.settled.get(timeout=WAIT_S) == 3


def test_a_guest_of_a_file_finds_pages_where_they_are_now(at: Setting) -> None:
    guest = Share(GUEST, on_joined=lambda peer: None, on_gone=lambda peer: None)
    pages = guest.connect(HOST, at.path)
    assert isinstance(pages, SharedPages)
    before = at.memory.pages.n_pages
    for n_chunks in (1, 4, 6):
        at.resize(n_chunks)
        assert at.settled.get(timeout=WAIT_S) == n_chunks
        last = at.memory.pages.n_pages - 1
        assert pages.description.n_pages == last + 1
        pages.write([last], np.full((1, LAYOUT.page_bytes), n_chunks, np.uint8), [0])
        assert (at.memory.pages.rows[last] == n_chunks).all()
        with pytest.raises(PeerFailed, match="were asked for"):
            pages.read([last + 1])
    assert at.memory.pages.n_pages > before
    guest.close()


def test_who_does_not_adapt_in_time_is_hung_up_on_but_not_taken_for_dead(at: Setting) -> None:
    with guest_by_hand(at.path, Introduce(peer=GUEST)) as (connection, mailbox):
        send_frame(connection, ProbeWritten(n_bytes=0))
        assert isinstance(mailbox.wait(WAIT_S), ProbeSeen)
        at.resize(2)
        changed = mailbox.wait(WAIT_S)
        assert isinstance(changed, Resized)
        assert isinstance(changed.description, PoolDescription)
        assert len(changed.description.chunk_offsets) == 2
        assert at.settled.empty()
        at.clock.advance(60_000.0)
        at.resize(3)  # wakes the host
        assert [at.settled.get(timeout=WAIT_S) for _ in range(2)] == [2, 3]
        with pytest.raises(PeerFailed, match="closed by the peer"):
            while True:
                mailbox.wait(WAIT_S)
        assert at.gone.empty(), "it may map the memory still"
    assert at.gone.get(timeout=WAIT_S) == GUEST


def test_a_change_that_comes_while_a_guest_maps_is_told_when_it_has_mapped(at: Setting) -> None:
    with guest_by_hand(at.path, Introduce(peer=GUEST)) as (connection, mailbox):
        at.resize(2)
        other = Share(PeerId("third@3"), on_joined=lambda peer: None, on_gone=lambda peer: None)
        other.connect(HOST, at.path)  # so the host has seen the change
        assert mailbox.next() is None
        assert at.settled.empty(), "a guest that maps the old pages is waited for"
        send_frame(connection, ProbeWritten(n_bytes=0))
        assert isinstance(mailbox.wait(WAIT_S), ProbeSeen)
        changed = mailbox.wait(WAIT_S)
        assert isinstance(changed, Resized)
        send_frame(connection, Adapted(version=changed.description.version))
        assert at.settled.get(timeout=WAIT_S) == 2
        other.close()


def test_a_guest_that_dies_is_waited_for_no_longer(at: Setting) -> None:
    with guest_by_hand(at.path, Introduce(peer=GUEST)):
        at.resize(2)
    assert at.settled.get(timeout=WAIT_S) == 2


def test_a_guest_with_a_device_that_says_no_goodbye_is_not_gone_while_its_process_lives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(monkeypatch)
    gone: queue.SimpleQueue[PeerId] = queue.SimpleQueue()
    host = DeviceParty("decode-0", 1, tmp_path, on_gone=gone.put)
    with guest_by_hand(host.path, Introduce(peer=GUEST, has_device=True)) as (connection, mailbox):
        send_frame(connection, Take(first=0))
        mailbox.wait(WAIT_S)
        mailbox.close()
    other = DeviceParty("prefill-1", 3, tmp_path, on_gone=lambda peer: None)
    other.share.connect(host.name, host.path)
    other.close()
    assert gone.get(timeout=WAIT_S) == other.name, "it said goodbye, and came later"
    assert gone.empty()
    host.close()


def refuse(pid: int) -> int:
    raise OSError(f"no descriptor of process {pid}")


DYING = """
import socket, sys
from pathlib import Path
from common.ids import PeerId
from tests.kvstore.transport.test_resized import GUEST, Introduce, guest_by_hand
with guest_by_hand(sys.argv[1], Introduce(peer=GUEST, has_device=True)) as (connection, mailbox):
    connection.shutdown(socket.SHUT_RDWR)  # as if the sockets of a dying process were closed first
    print("closed", flush=True)
    sys.stdin.read()
"""


@pytest.mark.system
@pytest.mark.parametrize("with_descriptor", [True, False])
def test_a_guest_with_a_device_is_gone_when_its_process_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_descriptor: bool
) -> None:
    pretend(monkeypatch)
    if not with_descriptor:
        monkeypatch.setattr(process_watch, "_SO_PEERPIDFD", -1)
        monkeypatch.setattr(os, "pidfd_open", refuse)
    gone: queue.SimpleQueue[PeerId] = queue.SimpleQueue()
    host = DeviceParty("decode-0", 1, tmp_path, on_gone=gone.put)
    other = DeviceParty("prefill-1", 3, tmp_path, on_gone=lambda peer: None)
    command = [sys.executable, "-c", DYING, host.path]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "closed\n"
        other.share.connect(host.name, host.path)
        other.share.hang_up(host.name)
        assert gone.get(timeout=WAIT_S) == other.name
        assert gone.empty()
        child.send_signal(signal.SIGKILL)
        assert gone.get(timeout=WAIT_S) == GUEST
    other.close()
    host.close()
