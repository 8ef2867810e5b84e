"""The guest's side of a share connection: dial, map, prove that both see the same memory, follow its changes."""

import secrets
import socket
import threading
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from common.errors import PeerFailed
from common.ids import PeerId
from kvstore.transport.descriptions import ChunksDescription, Description, MappedPages
from kvstore.transport.share_wire import (
    Adapted,
    Chunks,
    Introduce,
    Left,
    Mailbox,
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
from kvstore.transport.shared_pages import SharedPages
from kvstore.transport.socket_path import short_name

_ANSWER_WITHIN_S = 5.0
_TURN_WITHIN_S = 10.0  # whose host hangs keeps its turn for as long as an answer may take


class ChunkMapper(Protocol):
    """Maps device memory of other processes; None stands for a process without a device."""

    turn: threading.Lock
    """Held by the visit that takes a batch of descriptors: a process may have as few as 1024 open, and where many
    workers begin at once, many visits do."""

    def open(self, description: ChunksDescription, scratch_fd: int) -> MappedPages:
        """Map the scratch, and reserve addresses for the chunks. `scratch_fd` stays the caller's. Raises PeerFailed."""
        ...


@dataclass(frozen=True, slots=True)
class Visited:
    """A mapped peer: probed, and connected for life. One thread hears it; any may close it."""

    connection: socket.socket
    mailbox: Mailbox
    pages: MappedPages
    _open: threading.Lock = field(default_factory=threading.Lock)
    """Nothing is closed under somebody who is adapting to a change."""

    def close(self) -> None:
        """Unmap, then let the host know."""
        with self._open:
            self.pages.close()
            _leave(self.connection, self.mailbox)

    def hear(self) -> bool:
        """Answer what a readable connection says; False if it is at its end. Raises PeerFailed."""
        with self._open:
            return self._hear()

    def _hear(self) -> bool:
        try:
            alive = self.mailbox.pull()
            while (frame := self.mailbox.next()) is not None:
                match frame:
                    case Resized(description=description):
                        _require_host(description, self.pages.description.peer)
                        self.pages.redescribe(description)
                        self._follow()
                    case Chunks():
                        if _map_chunks(self.mailbox, self.pages, frame):
                            self._follow()
                    case _:
                        raise _unexpected(frame, self.pages.description.peer, "news of a change")
        except BlockingIOError:
            return True
        except OSError:
            return False  # a reset is an end as well
        return alive

    def _follow(self) -> None:
        """Ask for the chunks that are missing, or tell the host that none is."""
        missing = self.pages.missing_chunks
        description = self.pages.description
        if missing and isinstance(description, ChunksDescription):
            send_frame(self.connection, Take(first=description.n_chunks - missing))
        else:
            send_frame(self.connection, Adapted(version=description.version))


def visit(self_id: PeerId, host: PeerId, path: str, mapper: ChunkMapper | None = None) -> Visited:
    """Connect to `host` at `path` and map its pages. Raises PeerFailed, with nothing left open."""
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        raise PeerFailed(f"cannot reach the memory of {host}: {error}") from error
    mailbox = Mailbox(connection)
    try:
        connection.settimeout(_ANSWER_WITHIN_S)
        with short_name(Path(path)) as name:
            connection.connect(name)
        pages = _map(connection, mailbox, Introduce(peer=self_id, has_device=mapper is not None), host, mapper)
        try:
            if mapper is not None:
                _complete(connection, mailbox, pages, mapper.turn)
            _probe(connection, mailbox, pages)
        except BaseException:
            pages.close()
            raise
    except OSError as error:
        _leave(connection, mailbox)
        raise PeerFailed(f"cannot reach the memory of {host} at {path}: {error}") from error
    except BaseException:
        _leave(connection, mailbox)
        raise
    return Visited(connection, mailbox, pages)


def _leave(connection: socket.socket, mailbox: Mailbox) -> None:
    """The last word, when nothing is mapped any more."""
    with suppress(OSError):  # the host has gone itself, or does not read: then it waits for our end
        send_frame(connection, Left())
    mailbox.close()
    connection.close()


def _map(
    connection: socket.socket, mailbox: Mailbox, introduce: Introduce, host: PeerId, mapper: ChunkMapper | None
) -> MappedPages:
    send_frame(connection, introduce)
    frame = mailbox.wait(_ANSWER_WITHIN_S)
    if not isinstance(frame, Offer):
        raise _unexpected(frame, host, "an offer")
    fds = mailbox.take_fds(1)
    mailbox.close()  # there is one with an offer, and what else came is nobody's
    try:
        _require_host(frame.description, host)
        if not isinstance(frame.description, ChunksDescription):
            return SharedPages(frame.description, fds[0])
        if mapper is None:
            raise PeerFailed(f"the pages of {host} lie on a device, which this process does not use")
        return mapper.open(frame.description, fds[0])
    finally:
        close_all(fds)


def _unexpected(frame: ShareFrame, host: PeerId, expected: str) -> PeerFailed:
    """Why it cannot go on after this frame."""
    if isinstance(frame, NoOffer):
        return PeerFailed(f"{host} shares no memory: {frame.text}")
    return PeerFailed(f"{host} sent {type(frame).__name__}, not {expected}")


def _require_host(description: Description, host: PeerId) -> None:
    if description.peer != host:
        raise PeerFailed(f"{description.peer} listens where {host} was expected")


def _complete(connection: socket.socket, mailbox: Mailbox, pages: MappedPages, turn: threading.Lock) -> None:
    """Take the chunks, batch by batch; fewer than were described if the pool shrank, which the host will tell of.

    Raises PeerFailed, also if other visits of this process, of which one must have met a host that hangs, take too long.
    """
    description = pages.description
    while (missing := pages.missing_chunks) and isinstance(description, ChunksDescription):
        if not turn.acquire(timeout=_TURN_WITHIN_S):
            raise PeerFailed(f"no turn to map the memory of {description.peer} within {_TURN_WITHIN_S:g} s")
        try:
            send_frame(connection, Take(first=description.n_chunks - missing))
            frame = mailbox.wait(_ANSWER_WITHIN_S)
            if not isinstance(frame, Chunks):
                raise _unexpected(frame, description.peer, "chunks")
            if not _map_chunks(mailbox, pages, frame):
                return
        finally:
            mailbox.close()  # descriptors that came and were not taken must not outlive the turn
            turn.release()


def _map_chunks(mailbox: Mailbox, pages: MappedPages, frame: Chunks) -> bool:
    """Map the chunks that came with `frame`; False if they are none, or not the next ones any more. Raises PeerFailed.

    An answer crosses with the news of a change, after which other chunks may be the next ones.
    """
    description, missing = pages.description, pages.missing_chunks
    fds = mailbox.take_fds(frame.n_chunks)
    try:
        if not isinstance(description, ChunksDescription) or frame.first != description.n_chunks - missing:
            return False
        wanted = fds[:missing]
        if wanted:
            pages.add_chunks(wanted)
        return bool(wanted)
    finally:
        close_all(fds)


def _probe(connection: socket.socket, mailbox: Mailbox, pages: MappedPages) -> None:
    """Measure, write random bytes, and let the host tell their checksum."""
    pages.gib_per_s = pages.measure_gib_per_s()
    pattern = secrets.token_bytes(pages.description.probe_bytes)
    pages.write_probe(pattern)
    send_frame(connection, ProbeWritten(n_bytes=len(pattern)))
    frame = mailbox.wait(_ANSWER_WITHIN_S)
    if not isinstance(frame, ProbeSeen):
        raise _unexpected(frame, pages.description.peer, "what it sees")
    if frame != ProbeSeen(crc32=zlib.crc32(pattern)):
        raise PeerFailed(f"{pages.description.peer} does not see what was written into its memory")
