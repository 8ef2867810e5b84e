"""The host's side of share connections: hand out the memory, confirm the probe, notice the end."""

import os
import shutil
import socket
import stat
import zlib
from pathlib import Path

from common.errors import ConfigError, PeerFailed
from common.ids import PeerId
from kvstore.memory.shareable import PROBE_SLOT_BYTES, PROBE_SLOTS, Shareable
from kvstore.transport.share_wire import FrameReader, Introduce, NoOffer, Offer, ProbeSeen, ProbeWritten, encode_frame
from kvstore.transport.shared_pages import PoolDescription
from kvstore.transport.socket_path import short_name

_SEND_TIMEOUT_S = 1.0


class Guest:
    """One accepted connection."""

    def __init__(self, connection: socket.socket, number: int) -> None:
        self.connection, self.number = connection, number
        self.reader = FrameReader()
        self.peer: PeerId | None = None


class Host:
    """Owns the listening socket and the guests' connections. Used by the share's thread alone, but for `open`."""

    def __init__(self, self_id: PeerId, memory: Shareable, listener: socket.socket, path: Path) -> None:
        self._self_id, self._memory = self_id, memory
        self.listener, self.path = listener, path
        self._accepted = 0

    @staticmethod
    def open(self_id: PeerId, memory: Shareable, run_dir: Path) -> "Host":
        """Listen in a new folder of mode 0700 under `run_dir`. Raises ConfigError."""
        folder = run_dir / self_id
        path = folder / "pages.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=stat.S_IRWXU)
            with short_name(path) as name:
                listener.bind(name)
            listener.listen(64)
        except OSError as error:
            listener.close()
            raise ConfigError(f"--run-dir={run_dir}: cannot listen on {path}: {error}") from error
        listener.setblocking(False)
        return Host(self_id, memory, listener, path)

    def accept(self) -> Guest | None:
        """A new connection; None if it went away meanwhile."""
        try:
            connection, _ = self.listener.accept()
        except OSError:
            return None  # gone before it was accepted: it has nothing of ours
        connection.settimeout(_SEND_TIMEOUT_S)
        self._accepted += 1
        return Guest(connection, self._accepted)

    def hear(self, guest: Guest) -> bool:
        """Answer what a readable connection says; False if it is at its end. Raises PeerFailed."""
        try:
            piece = guest.connection.recv(65536)
        except OSError:
            return False  # a reset is an end as well
        for frame in guest.reader.feed(piece):
            match frame:
                case Introduce(peer=peer) if guest.peer is None:
                    guest.peer = peer
                    self._offer(guest)
                case ProbeWritten(n_bytes=n_bytes) if guest.peer is not None and 0 <= n_bytes <= PROBE_SLOT_BYTES:
                    self._confirm(guest, n_bytes)
                case _:
                    raise PeerFailed(f"{guest.peer or 'a guest'} sent {type(frame).__name__} out of turn")
        return bool(piece)

    def _offer(self, guest: Guest) -> None:
        pages = self._memory.pages_in_file
        if pages is None:
            self._refuse(guest, f"{self._self_id} has no pages yet: it waits for the first Hello of a worker")
            return
        description = PoolDescription(
            peer=self._self_id,
            page_bytes=pages.page_bytes,
            chunk_bytes=pages.chunk_bytes,
            chunk_offsets=pages.chunk_offsets,
            probe_offset_bytes=self._slot_bytes(guest),
            probe_bytes=PROBE_SLOT_BYTES,
        )
        frame, fds = encode_frame(Offer(description=description)), self._memory.export_fds()
        try:
            sent = socket.send_fds(guest.connection, [frame], fds)
            guest.connection.sendall(frame[sent:])
        except OSError as error:
            raise PeerFailed(f"{guest.peer} did not take the offer: {error}") from error
        finally:
            for fd in fds:
                os.close(fd)

    def _refuse(self, guest: Guest, text: str) -> None:
        try:
            guest.connection.sendall(encode_frame(NoOffer(text=text)))
        except OSError as error:
            raise PeerFailed(f"{guest.peer} did not wait for an answer: {error}") from error

    def _confirm(self, guest: Guest, n_bytes: int) -> None:
        slot_bytes = self._slot_bytes(guest)
        seen = self._memory.read_scratch(slot_bytes, n_bytes)
        self._memory.discard(slot_bytes, PROBE_SLOT_BYTES)
        try:
            guest.connection.sendall(encode_frame(ProbeSeen(crc32=zlib.crc32(seen))))
        except OSError as error:
            raise PeerFailed(f"{guest.peer} did not wait for the probe: {error}") from error

    def _slot_bytes(self, guest: Guest) -> int:
        """Scratch of one connection; shared only by guests whose probes are PROBE_SLOTS connections apart."""
        return self._memory.probe_offset_bytes + guest.number % PROBE_SLOTS * PROBE_SLOT_BYTES

    def close(self) -> None:
        """Stop listening and remove the folder."""
        self.listener.close()
        shutil.rmtree(self.path.parent, ignore_errors=True)  # a folder removed by others is as gone as ours
