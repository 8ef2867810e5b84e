"""The guest's side of a share connection: dial, map, prove that both see the same memory."""

import os
import secrets
import socket
import time
import zlib
from pathlib import Path

from common.errors import PeerFailed
from common.ids import PeerId
from kvstore.transport.share_wire import Introduce, NoOffer, Offer, ProbeSeen, ProbeWritten, encode_frame, receive_frame
from kvstore.transport.shared_pages import SharedPages
from kvstore.transport.socket_path import short_name

_TIMEOUT_S = 2.0
_ROUNDS = 8


def visit(self_id: PeerId, host: PeerId, path: str) -> tuple[socket.socket, SharedPages]:
    """Connect to `host` at `path` and map its pages. Raises PeerFailed, with nothing left open."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_TIMEOUT_S)
        with short_name(Path(path)) as name:
            connection.connect(name)
        pages = _map(connection, self_id, host, deadline_s)
        try:
            _probe(connection, pages, deadline_s)
        except BaseException:
            pages.close()
            raise
    except OSError as error:
        connection.close()
        raise PeerFailed(f"cannot reach the memory of {host} at {path}: {error}") from error
    except BaseException:
        connection.close()
        raise
    return connection, pages


def _map(connection: socket.socket, self_id: PeerId, host: PeerId, deadline_s: float) -> SharedPages:
    connection.sendall(encode_frame(Introduce(peer=self_id)))
    frame, fds = receive_frame(connection, deadline_s)
    try:
        if isinstance(frame, NoOffer):
            raise PeerFailed(f"{host} shares no memory: {frame.text}")
        if not isinstance(frame, Offer) or len(fds) != 1:
            raise PeerFailed(f"{host} answered {type(frame).__name__} with {len(fds)} descriptors, not an offer")
        if frame.description.peer != host:
            raise PeerFailed(f"{frame.description.peer} listens where {host} was expected")
        return SharedPages(frame.description, fds[0])
    finally:
        for fd in fds:
            os.close(fd)


def _probe(connection: socket.socket, pages: SharedPages, deadline_s: float) -> None:
    """Write random bytes, let the host tell their checksum, and measure how fast writing goes."""
    pattern = secrets.token_bytes(pages.description.probe_bytes)
    pages.write_probe(pattern)
    began_s = time.perf_counter()
    for _ in range(_ROUNDS):
        pages.write_probe(pattern)
    elapsed_s = time.perf_counter() - began_s
    connection.sendall(encode_frame(ProbeWritten(n_bytes=len(pattern))))
    frame, _ = receive_frame(connection, deadline_s)
    if frame != ProbeSeen(crc32=zlib.crc32(pattern)):
        raise PeerFailed(f"{pages.description.peer} does not see what was written into its memory")
    pages.gib_per_s = _ROUNDS * len(pattern) / max(elapsed_s, 1e-9) / 2**30
