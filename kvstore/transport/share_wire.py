"""What two processes say on a share connection: length-prefixed MessagePack over a Unix stream socket.

    guest -> host   Introduce      who I am
    host -> guest   Offer          where the pages lie; the descriptor of the file, or of the scratch, travels with it
                    NoOffer        or, as any later answer too: there is nothing to map, and why
    guest -> host   Take           I have mapped so many chunks: give me the next ones (memory in chunks only)
    host -> guest   Chunks         as many as one message carries; their descriptors travel with it
    guest -> host   ProbeWritten   I wrote so many bytes into my scratch
    host -> guest   ProbeSeen      checksum of what I see there

    host -> guest   Resized        any time later: the pool has changed, this is what it is now
    guest -> host   Adapted        after Take and Chunks as above: I map exactly that
    guest -> host   Left           the last word: I have unmapped everything

Afterwards both keep the connection open and silent: its end of file is the news of the other's death.

Chunks are taken batch by batch because descriptors on their way count against the limit of open files: one batch at a
time is on its way, however many chunks there are.
"""

import os
import socket
import struct
import time
from collections.abc import Sequence

import msgspec

from common.errors import PeerFailed
from common.ids import PeerId
from kvstore.transport.descriptions import ChunksDescription, PoolDescription

MAX_FDS = 250
"""Descriptors in one message; the kernel takes 253."""
_LENGTH = struct.Struct("<I")
_MAX_FRAME_BYTES = 16 * 2**20


class Introduce(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Opens a share connection."""

    peer: PeerId
    has_device: bool = False
    """Whether the guest can map chunks of device memory, and may let its device write what it maps."""


class Offer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The host's answer; one descriptor travels with it."""

    description: PoolDescription | ChunksDescription


class NoOffer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The host's other answer: nothing to map now, or no more of it. The guest unmaps what it has and hangs up."""

    text: str


class Take(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The guest wants descriptors of the chunks from `first` on."""

    first: int


class Chunks(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer to Take: descriptors of `n_chunks` chunks from `first` on travel with it; 0 if the pool is shorter now."""

    first: int
    n_chunks: int


class ProbeWritten(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The guest wrote into its scratch."""

    n_bytes: int


class ProbeSeen(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The host read it."""

    crc32: int


class Resized(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The pool has changed; its probe's place has not."""

    description: PoolDescription | ChunksDescription


class Adapted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The guest maps what `version` of the description says, and nothing else."""

    version: int


class Left(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The guest has unmapped everything and hangs up. Without it, an end of the connection is its death."""


ShareFrame = Introduce | Offer | NoOffer | Take | Chunks | ProbeWritten | ProbeSeen | Resized | Adapted | Left
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[ShareFrame] = msgspec.msgpack.Decoder(ShareFrame)


def encode_frame(frame: ShareFrame) -> bytes:
    """Length and MessagePack."""
    body = _encoder.encode(frame)
    return _LENGTH.pack(len(body)) + body


def send_frame(connection: socket.socket, frame: ShareFrame, fds: Sequence[int] = ()) -> None:
    """Send one frame, its descriptors with its first byte. `fds` stay the caller's. Raises OSError."""
    encoded = encode_frame(frame)
    sent = socket.send_fds(connection, [encoded], fds) if fds else 0
    if sent < len(encoded):  # sending nothing fails too where the other end has gone
        connection.sendall(encoded[sent:])


class FrameReader:
    """Puts frames together from whatever pieces the socket gives."""

    def __init__(self) -> None:
        self._received = bytearray()

    def feed(self, piece: bytes) -> list[ShareFrame]:
        """The frames that are complete now. Raises PeerFailed for what is not a frame."""
        self._received += piece
        frames: list[ShareFrame] = []
        while len(self._received) >= _LENGTH.size:
            (n_bytes,) = _LENGTH.unpack_from(self._received)
            if n_bytes > _MAX_FRAME_BYTES:
                raise PeerFailed(f"share frame of {n_bytes} bytes; at most {_MAX_FRAME_BYTES} are allowed")
            end = _LENGTH.size + n_bytes
            if len(self._received) < end:
                break
            try:
                frames.append(_decoder.decode(bytes(self._received[_LENGTH.size : end])))
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise PeerFailed(f"unreadable share frame of {n_bytes} bytes: {error}") from error
            del self._received[:end]
        return frames


class Mailbox:
    """The guest's end of a connection: frames in order, and the descriptors that came with them until they are taken."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = FrameReader()
        self._frames: list[ShareFrame] = []
        self._fds: list[int] = []

    def wait(self, within_s: float) -> ShareFrame:
        """The next frame, which comes `within_s` seconds. Raises PeerFailed."""
        deadline_s = time.monotonic() + within_s
        while not self._frames:
            self._connection.settimeout(max(0.001, deadline_s - time.monotonic()))
            try:
                alive = self.pull()
            except OSError as error:
                raise PeerFailed(f"no answer on the share connection: {error}") from error
            if not alive:
                raise PeerFailed("the share connection was closed by the peer")
        return self._frames.pop(0)

    def pull(self) -> bool:
        """Read what is there; False at the end of the connection. Raises OSError, BlockingIOError among them, PeerFailed."""
        piece, fds, flags, _ = socket.recv_fds(self._connection, 65536, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        self._fds += fds
        if len(self._fds) > MAX_FDS:  # more than one batch is on its way only if the host does not wait its turn
            raise PeerFailed(
                f"{len(self._fds)} descriptors came that nobody asked for; at most {MAX_FDS} are on their way"
            )
        if flags & socket.MSG_CTRUNC:
            raise PeerFailed(
                f"descriptors were lost on the way: more than {MAX_FDS}, or this process has too many open"
            )
        self._frames += self._reader.feed(piece)
        return bool(piece)

    def next(self) -> ShareFrame | None:
        """The next frame that is there already."""
        return self._frames.pop(0) if self._frames else None

    def take_fds(self, n_fds: int) -> list[int]:
        """The next descriptors, which the caller closes. Raises PeerFailed if fewer came."""
        if not 0 <= n_fds <= len(self._fds):
            raise PeerFailed(f"{n_fds} descriptors were announced and {len(self._fds)} came")
        taken, self._fds = self._fds[:n_fds], self._fds[n_fds:]
        return taken

    def close(self) -> None:
        """Close the descriptors that nobody took. The connection is the caller's."""
        close_all(self.take_fds(len(self._fds)))


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors of ours."""
    for fd in fds:
        os.close(fd)
