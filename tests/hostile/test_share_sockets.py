"""Strangers and liars at the sockets that hand out page memory: both ends live, leak nothing, and serve the others."""

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from common.errors import PeerFailed
from common.ids import PeerId
from kvstore.memory.page_memory import open_page_memory
from kvstore.transport import host as host_module
from kvstore.transport import share_wire
from kvstore.transport.descriptions import ChunksDescription, PoolDescription
from kvstore.transport.guest import visit
from kvstore.transport.share import Share
from kvstore.transport.share_wire import (
    Adapted,
    Chunks,
    Introduce,
    Left,
    NoOffer,
    Offer,
    ProbeSeen,
    ProbeWritten,
    Resized,
    ShareFrame,
    Take,
    encode_frame,
)
from kvstore.transport.socket_path import short_name
from tests.kvstore.transport.test_share import GUEST, HOST, LAYOUT, MIB, WAIT_S, Party

STRANGER = PeerId("stranger@9")


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def require_back(before: int) -> None:
    """All that was opened since is closed; the host's thread may still be at the last one."""
    deadline_s = time.monotonic() + WAIT_S
    while open_fds() > before:
        assert time.monotonic() < deadline_s, f"{open_fds() - before} descriptors leaked"
        os.sched_yield()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Party]:
    with closing(Party(HOST, tmp_path)) as made:
        yield made


@pytest.fixture
def regular(host: Party, tmp_path: Path) -> Iterator[Callable[[], None]]:
    """A guest that is there all the time; the call has it write through its mapping, and another one come and go."""
    with closing(Share(GUEST, on_joined=lambda peer: None, on_gone=lambda peer: None)) as share:
        pages = share.connect(HOST, host.path)

        def check() -> None:
            pages.write([5], np.full((1, LAYOUT.page_bytes), 7, np.uint8), [0])
            assert (host.memory.pages.rows[5] == 7).all()
            assert not pages.closed
            visited = visit(PeerId("other@3"), HOST, host.path)
            visited.close()

        yield check


def dial(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with short_name(Path(path)) as name:
        made.connect(name)  # waits where the queue is full
    made.settimeout(WAIT_S)
    return made


def read_to_end(connection: socket.socket) -> None:
    with suppress(ConnectionResetError):
        while connection.recv(65536):
            pass


def throw(path: str, *pieces: bytes, fds: Sequence[int] = (), end: bool = True) -> None:
    """Say this, and wait until the host hangs up."""
    with dial(path) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            if fds:
                socket.send_fds(connection, [pieces[0]], fds)
            for piece in pieces[bool(fds) :]:
                connection.sendall(piece)
            if end:
                connection.shutdown(socket.SHUT_WR)
        read_to_end(connection)


FRAMES: tuple[ShareFrame, ...] = (
    *(Introduce(peer=STRANGER), Introduce(peer=PeerId("")), Introduce(peer=PeerId("x" * 100_000)), Left()),
    *(Take(first=value) for value in (0, -1, 2**63 - 1)),
    *(ProbeWritten(n_bytes=value) for value in (0, 1, -1, 2**21, 2**21 + 1, 2**62)),
    *(Adapted(version=value) for value in (0, -1, 1, 2**62)),
    *(NoOffer(text="no"), Chunks(first=0, n_chunks=3), ProbeSeen(crc32=5)),
    Offer(
        description=PoolDescription(
            peer=STRANGER, page_bytes=1, chunk_bytes=1, chunk_offsets=(), probe_offset_bytes=0, probe_bytes=0
        )
    ),
)


def test_frames_out_of_turn_and_damaged_ones_end_their_connection_alone(
    host: Party, regular: Callable[[], None]
) -> None:
    chance, before = random.Random(4), open_fds()
    for _ in range(150):
        sent = b"".join(encode_frame(chance.choice(FRAMES)) for _ in range(chance.randint(1, 5)))
        if chance.random() < 0.5:
            sent = encode_frame(Introduce(peer=STRANGER)) + sent
        if chance.random() < 0.5:
            raw = bytearray(sent)
            for _ in range(chance.randint(1, 3)):
                raw[chance.randrange(len(raw))] = chance.randrange(256)
            sent = bytes(raw)
        throw(host.path, sent)
    for _ in range(50):
        throw(host.path, chance.randbytes(chance.randint(1, 300)))
    regular()
    require_back(before)


def test_half_frames_byte_by_byte_and_huge_lengths(host: Party, regular: Callable[[], None]) -> None:
    whole = encode_frame(Introduce(peer=STRANGER))
    before = open_fds()
    with ExitStack() as stack:
        slow = [stack.enter_context(dial(host.path)) for _ in range(8)]
        for at in range(len(whole) - 1):
            for one in slow:
                one.sendall(whole[at : at + 1])
        regular()
    throw(host.path, struct.pack("<I", 2**32 - 1), end=False)
    throw(host.path, struct.pack("<I", 16 * 2**20 + 1), end=False)
    throw(host.path, struct.pack("<I", 16 * 2**20) + b"x" * 2**20)
    throw(host.path, struct.pack("<I", 200_000) + b"\x91" * 200_000, end=False)
    regular()
    require_back(before)


def test_descriptors_that_a_guest_sends_are_not_kept(host: Party, regular: Callable[[], None]) -> None:
    read_end, write_end = os.pipe()
    try:
        before = open_fds()
        for _ in range(5):
            throw(host.path, encode_frame(Introduce(peer=STRANGER)), fds=[read_end] * 200)
        with dial(host.path) as connection:
            connection.sendall(struct.pack("<I", 1000))  # of a frame that never ends
            for _ in range(10):
                socket.send_fds(connection, [b"x"], [write_end] * 200)
            regular()
        regular()
        require_back(before)
    finally:
        os.close(read_end)
        os.close(write_end)


def test_a_thousand_connections_that_say_nothing_leave_room_for_others(
    host: Party, regular: Callable[[], None]
) -> None:
    """Of those that do not say who they are the eldest go; each of ours costs this process two descriptors."""
    before = open_fds()
    with ExitStack() as stack:
        held = []
        for number in range(1_000):
            held.append(stack.enter_context(dial(host.path)))
            if len(held) > 300:
                held.pop(0).close()
            if number % 250 == 0:
                regular()
        regular()
        assert open_fds() - before <= len(held) + 2 * 64
    regular()


def test_no_more_guests_than_there_is_room_for(
    host: Party, regular: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    regular()
    monkeypatch.setattr(host_module, "_MOST_GUESTS", 1)
    with pytest.raises(PeerFailed, match="has 1 guests already"):
        visit(STRANGER, HOST, host.path)
    monkeypatch.undo()
    regular()


def test_a_guest_that_never_reads_holds_nobody_up_for_ever(host: Party, regular: Callable[[], None]) -> None:
    with dial(host.path) as connection:
        connection.sendall(encode_frame(Introduce(peer=STRANGER)))
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(encode_frame(ProbeWritten(n_bytes=0)) * 20_000)
        regular()
    regular()


def test_who_talks_on_after_an_offence_is_not_listened_to_for_ever() -> None:
    mine, theirs = socket.socketpair()
    stop = threading.Event()

    def talk() -> None:
        with suppress(OSError):
            while not stop.is_set():
                theirs.sendall(encode_frame(Adapted(version=0)) * 4_000)

    with mine, theirs:
        talker = threading.Thread(target=talk, daemon=True)
        talker.start()
        guest = host_module.Guest(mine, 1)
        done = threading.Event()
        host = object.__new__(host_module.Host)
        threading.Thread(target=lambda: (host.hear_last(guest), done.set()), daemon=True).start()
        assert done.wait(WAIT_S) and not guest.left
        stop.set()


def _description(**changes: Any) -> PoolDescription:
    fields: dict[str, Any] = {
        "peer": HOST,
        "page_bytes": LAYOUT.page_bytes,
        "chunk_bytes": 2 * MIB,
        "chunk_offsets": (0, 2 * MIB),
        "probe_offset_bytes": 4 * MIB,
        "probe_bytes": 1,
    }
    return PoolDescription(**{**fields, **changes})


@contextmanager
def lying_host(folder: Path, *answers: tuple[bytes, Sequence[int]]) -> Iterator[str]:
    """Takes one guest and gives it these bytes and descriptors, then listens until it leaves."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        path = folder / "liar.sock"
        with short_name(path) as name:
            listener.bind(name)
        listener.listen(1)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.recv(65536)
                for said, fds in answers:
                    socket.send_fds(connection, [said], fds) if fds else connection.sendall(said)
                connection.shutdown(socket.SHUT_WR)
                read_to_end(connection)

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        yield str(path)
        server.join(WAIT_S)
        path.unlink()


@pytest.fixture(scope="module")
def kinds() -> Iterator[dict[str, int]]:
    """Descriptors of every kind."""
    with ExitStack() as stack:
        memory = open_page_memory(4 * MIB, LAYOUT)
        stack.callback(memory.close)
        read_end, write_end = os.pipe()
        unsealed = os.memfd_create("unsealed")
        os.ftruncate(unsealed, 8 * MIB)
        empty = os.memfd_create("empty", os.MFD_ALLOW_SEALING)
        folder, null, one = os.open("/tmp", os.O_RDONLY), os.open("/dev/zero", os.O_RDWR), socket.socket()
        stack.callback(one.close)
        found = {
            "pipe": read_end,
            "write": write_end,
            "unsealed": unsealed,
            "empty": empty,
            "dir": folder,
            "zero": null,
        }
        for fd in found.values():
            stack.callback(os.close, fd)
        yield {**found, "socket": one.fileno(), "good": memory.backend.fd}


def refused_visit(folder: Path, *answers: tuple[bytes, Sequence[int]]) -> None:
    before = open_fds()
    with lying_host(folder, *answers) as path:
        with pytest.raises(PeerFailed):
            visit(GUEST, HOST, path)
    require_back(before)


def test_an_offer_of_what_is_no_memory_is_refused(tmp_path: Path, kinds: dict[str, int]) -> None:
    offer = encode_frame(Offer(description=_description()))
    for kind, fd in kinds.items():
        if kind != "good":
            refused_visit(tmp_path, (offer, [fd]))
    refused_visit(tmp_path, (offer, []))
    refused_visit(tmp_path, (offer, [kinds["good"]] * 250))
    refused_visit(tmp_path, (offer[:5], [kinds["pipe"]] * 200), (offer[5:], [kinds["pipe"]] * 200))


def test_an_offer_that_lies_about_its_file_is_refused(tmp_path: Path, kinds: dict[str, int]) -> None:
    extremes = (-(2**63), -(2**21), -1, 0, 2**62, 2**63 - 1)
    lies = [
        *(_description(**{field: value}) for field in ("page_bytes", "chunk_bytes") for value in extremes),
        *(_description(probe_bytes=value) for value in (-(2**63), -1, 2**40, 2**63 - 1)),
        *(_description(probe_offset_bytes=value) for value in (-1, 2**62)),
        *(_description(chunk_offsets=value) for value in ((-1,), (2**62,), (0,) * 2**18 + (7,))),
        _description(page_bytes=1, chunk_offsets=(0,) * 500),
        _description(peer=PeerId("")),
        ChunksDescription(
            peer=HOST,
            device_uuid="",
            page_bytes=0,
            chunk_bytes=-1,
            n_chunks=2**62,
            capacity_chunks=2**62,
            scratch_bytes=-1,
            probe_offset_bytes=0,
            probe_bytes=0,
        ),
    ]
    for lie in lies:
        refused_visit(tmp_path, (encode_frame(Offer(description=lie)), [kinds["good"]]))


def test_answers_out_of_turn_and_damaged_ones_are_refused(tmp_path: Path, kinds: dict[str, int]) -> None:
    chance, good = random.Random(2), encode_frame(Offer(description=_description()))
    frames = [encode_frame(frame) for frame in (*FRAMES, Resized(description=_description()))]
    for _ in range(25):
        first = (good, [kinds["good"]]) if chance.random() < 0.7 else (chance.choice(frames), [kinds["pipe"]] * 3)
        rest = bytearray(b"".join(chance.choice(frames) for _ in range(3)))
        if chance.random() < 0.5:
            rest[chance.randrange(len(rest))] ^= 0xFF
        refused_visit(tmp_path, first, (bytes(rest), []))


def test_descriptors_that_nobody_asked_for_end_the_connection(tmp_path: Path, kinds: dict[str, int]) -> None:
    """After a good beginning too: they would fill this process's table one by one."""
    mine, theirs = socket.socketpair()
    before = open_fds()
    with mine, theirs:
        mailbox = share_wire.Mailbox(mine)
        with pytest.raises(PeerFailed, match="nobody asked for"):
            for _ in range(10):
                socket.send_fds(theirs, [b"\xff"], [kinds["pipe"]] * 100)
                mailbox.pull()
        assert open_fds() - before <= 300
        mailbox.close()
        require_back(before)
        with pytest.raises(PeerFailed, match="announced"):
            mailbox.take_fds(-1)


def test_no_bytes_raise_anything_but_a_peers_failure() -> None:
    chance = random.Random(11)
    frames = [encode_frame(frame) for frame in FRAMES]
    for _ in range(2_000):
        raw = bytearray(chance.choice(frames)[:400])
        for _ in range(chance.randint(1, 4)):
            raw[chance.randrange(4, len(raw))] = chance.randrange(256)
        with suppress(PeerFailed):
            for frame in share_wire.FrameReader().feed(bytes(raw)):
                assert isinstance(frame, msgspec.Struct)
