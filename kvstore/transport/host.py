"""The host's side of share connections: hand out the memory, confirm the probe, tell of changes, notice the end."""

import errno
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError, PeerFailed
from common.ids import PeerId
from common.log import Log
from kvstore.memory.shareable import Shareable
from kvstore.transport.offering import Offering
from kvstore.transport.process_watch import ProcessWatch, watch_peer
from kvstore.transport.refusals import REFUSED
from kvstore.transport.share_wire import (
    MAX_FDS,
    Adapted,
    Chunks,
    FrameReader,
    Introduce,
    Left,
    NoOffer,
    Offer,
    ProbeSeen,
    ProbeWritten,
    Resized,
    ShareFrame,
    Take,
    close_all,
    send_frame,
)
from kvstore.transport.socket_folder import SocketFolder, sweep
from kvstore.transport.socket_path import short_name

_SEND_TIMEOUT_S = 1.0
_MOST_NAME = 256  # characters; ids have a quarter
_MOST_GUESTS = 512
_MOST_WAITING = 1024  # to be accepted: whoever comes to a full queue is refused at once
_LAST_PIECES = 64  # of 64 KiB: who says goodbye has said it by then
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
_WAIT_FOR_DESCRIPTORS_S = 0.02


class Guest:
    """One accepted connection."""

    def __init__(self, connection: socket.socket, number: int) -> None:
        self.connection, self.number = connection, number
        self.reader = FrameReader()
        self.peer: PeerId | None = None
        self.told_version = -1
        """Of the last description that it was sent; -1: none."""
        self.adapted_version = -1
        """Of the last one that it confirmed to map; -1: it is still mapping the first."""
        self.dismissed = False
        """Whether our side is closed: it hears the end, unmaps, and closes its own."""
        self.left = False
        """Whether it said itself that it has unmapped everything."""
        self.process: ProcessWatch | None = None
        """Of guests with a device."""

    @property
    def may_write_still(self) -> bool:
        """Whether the end of its connection does not mean yet that it writes no more.

        A dying process's memory is unmapped before its sockets are closed, but its work on a device is stopped only
        when the device's own files are closed, which may be later: such a process must be gone altogether.
        """
        return self.process is not None and not self.left and not self.process.gone

    def close(self) -> None:
        """End the connection, if it has not ended, and the watch over its process."""
        self.connection.close()
        if self.process is not None:
            self.process.close()


@dataclass(frozen=True, slots=True)
class _Change:
    """Waits until no guest maps what was before `version`, or `until_ms`."""

    version: int
    until_ms: float
    on_settled: Callable[[], None]


class Host:
    """Owns the listening socket, and what its guests were told. Used by the share's thread alone, but for `open`."""

    def __init__(self, self_id: PeerId, memory: Shareable, listener: socket.socket, folder: SocketFolder) -> None:
        self._self_id, self._memory = self_id, Offering(memory)
        self.listener, self.path, self._folder = listener, folder.path, folder
        self._accepted = 0
        self._version = 0
        self._guests: dict[Guest, None] = {}  # those that were made an offer
        self._changes: list[_Change] = []
        self._log = Log(process=self_id)

    @staticmethod
    def open(self_id: PeerId, memory: Shareable, run_dir: Path) -> "Host":
        """Listen in a new folder under `run_dir`, and remove those of lives that were killed. Raises ConfigError."""
        if removed := sweep(run_dir, time.time()):
            names = [folder.name for folder in removed]
            Log(process=self_id).event("socket_folders_removed", run_dir=str(run_dir), of=names[:16], n=len(names))
        folder: SocketFolder | None = None
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            folder = SocketFolder(run_dir, self_id)
            with short_name(folder.path) as name:
                listener.bind(name)
            listener.listen(_MOST_WAITING)
        except OSError as error:
            listener.close()
            if folder is not None:
                folder.close()
            raise ConfigError(f"--run-dir={run_dir}: cannot listen in {run_dir / self_id}: {error}") from error
        listener.setblocking(False)
        return Host(self_id, memory, listener, folder)

    def accept(self) -> Guest | None:
        """A new connection; None if it went away meanwhile."""
        try:
            connection, _ = self.listener.accept()
        except OSError as error:
            if error.errno in _NO_DESCRIPTORS:  # it waits in the queue, and who asks at once again takes a whole core
                time.sleep(_WAIT_FOR_DESCRIPTORS_S)
            return None  # else gone before it was accepted: it has nothing of ours
        connection.settimeout(_SEND_TIMEOUT_S)
        self._accepted += 1
        return Guest(connection, self._accepted)

    def hear(self, guest: Guest) -> bool:
        """Answer what a readable connection says; False if it is at its end. Raises PeerFailed."""
        try:
            piece = guest.connection.recv(65536)
        except OSError:
            return False  # a reset is an end as well
        frames = guest.reader.feed(piece)
        guest.left = guest.left or any(isinstance(frame, Left) for frame in frames)  # also if an answer before it fails
        for frame in frames:
            try:
                self._answer(guest, frame)
            except PeerFailed:
                raise
            except REFUSED as error:  # by the system or the driver, to us
                self._refuse(guest, f"{self._self_id} cannot answer {type(frame).__name__}: {error}")
        return bool(piece)

    def _answer(self, guest: Guest, frame: ShareFrame) -> None:
        """Raises PeerFailed for what the guest did, and one of REFUSED for what we could not do."""
        match frame:
            case Introduce(peer=peer) if guest.peer is None and 0 < len(peer) <= _MOST_NAME:
                guest.peer = peer
                self._offer(guest, frame)
            case Take(first=first) if guest in self._guests:
                self._give(guest, first)
            case ProbeWritten(n_bytes=n_bytes) if guest in self._guests:
                self._confirm(guest, n_bytes)
            case Left() if guest.peer is not None:
                pass  # noted above; the end of the connection follows
            case Adapted(version=version) if guest.adapted_version >= 0 and version <= guest.told_version:
                guest.adapted_version = version
            case _:
                raise PeerFailed(f"{guest.peer or 'a guest'} sent {type(frame).__name__} out of turn")

    def _offer(self, guest: Guest, introduced: Introduce) -> None:
        if len(self._guests) >= _MOST_GUESTS:
            self._send(guest, NoOffer(text=f"{self._self_id} has {_MOST_GUESTS} guests already"))
            return
        description = self._memory.describe(self._self_id, guest.number, self._version)
        if description is None:
            self._send(
                guest, NoOffer(text=f"{self._self_id} has no pages yet: it waits for the first Hello of a worker")
            )
            return
        if self._memory.needs_mapper and not introduced.has_device:
            self._send(guest, NoOffer(text=f"the pages of {self._self_id} lie on a device, and the guest uses none"))
            return
        if introduced.has_device:
            guest.process = watch_peer(guest.connection)
            if guest.process is None:
                self._send(guest, NoOffer(text=f"{self._self_id} cannot see when the guest's process has ended"))
                return
        self._guests[guest] = None
        guest.told_version = self._version
        self._send(guest, Offer(description=description), self._memory.export_first())

    def _give(self, guest: Guest, first: int) -> None:
        fds = self._memory.export_chunks(first, MAX_FDS)
        self._send(guest, Chunks(first=first, n_chunks=len(fds)), fds)

    def _refuse(self, guest: Guest, text: str) -> None:
        """We cannot go on with a guest that did no wrong: it is told why, unmaps what it has, and says goodbye."""
        self._log.event("guest_refused", guest=guest.peer, text=text)
        self._send(guest, NoOffer(text=text))
        self._dismiss(guest)

    def _confirm(self, guest: Guest, n_bytes: int) -> None:
        self._send(guest, ProbeSeen(crc32=self._memory.checksum(guest.number, n_bytes)))
        guest.adapted_version = max(guest.adapted_version, guest.told_version)
        self._tell(guest)  # of a change that came while it was mapping

    def _tell(self, guest: Guest) -> None:
        """Of the last change, unless it knows. Raises PeerFailed."""
        if guest.adapted_version < 0 or guest.told_version == self._version:
            return
        description = self._memory.describe(self._self_id, guest.number, self._version)
        if description is not None:
            guest.told_version = self._version
            self._send(guest, Resized(description=description))

    def _send(self, guest: Guest, frame: ShareFrame, fds: list[int] | None = None) -> None:
        """Raises PeerFailed. Closes `fds`."""
        try:
            send_frame(guest.connection, frame, fds or ())
        except OSError as error:
            raise PeerFailed(f"{guest.peer} did not take {type(frame).__name__}: {error}") from error
        finally:
            close_all(fds or ())

    def changed(self, on_settled: Callable[[], None], until_ms: float) -> None:
        """Tell every guest of the memory as it is now; `settle` calls `on_settled` when all have adapted."""
        self._version += 1
        self._changes.append(_Change(self._version, until_ms, on_settled))
        for guest in self._guests:
            try:
                self._tell(guest)
            except PeerFailed:
                self._dismiss(guest)

    def settle(self, now_ms: float) -> None:
        """End the changes that all guests have adapted to; who is late is dismissed, and waited for no more."""
        for change in list(self._changes):
            late = [g for g in self._guests if not g.dismissed and g.adapted_version < change.version]
            if late and now_ms < change.until_ms:
                continue
            for guest in late:
                self._dismiss(guest)
            self._changes.remove(change)
            change.on_settled()

    def settle_by_ms(self) -> float | None:
        """When the next change ends at the latest; None without any."""
        return min((change.until_ms for change in self._changes), default=None)

    def _dismiss(self, guest: Guest) -> None:
        """Let the guest hear the end. The news of its own end comes when it has really unmapped, not before."""
        guest.dismissed = True
        try:
            guest.connection.shutdown(socket.SHUT_WR)
        except OSError:
            return  # it is gone already, which its connection tells

    def hear_last(self, guest: Guest) -> None:
        """Its connection ends on our side: read whether it said goodbye before."""
        guest.connection.setblocking(False)
        with suppress(OSError, PeerFailed):  # nothing more is there, or nothing that could be read
            for _ in range(_LAST_PIECES):
                piece = guest.connection.recv(65536)
                if not piece:
                    return
                if any(isinstance(frame, Left) for frame in guest.reader.feed(piece)):
                    guest.left = True

    def forget(self, guest: Guest) -> None:
        """Its connection has ended."""
        self._guests.pop(guest, None)

    def close(self) -> None:
        """Stop listening and remove the folder."""
        self.listener.close()
        self._folder.close()
