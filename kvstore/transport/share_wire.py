"""What two processes say on a share connection: length-prefixed MessagePack over a Unix stream socket.

    guest -> host   Introduce      who I am
    host -> guest   Offer          where the pages lie; the file descriptor travels with it
                    NoOffer        or: there is nothing to map, and why
    guest -> host   ProbeWritten   I wrote so many bytes into my scratch
    host -> guest   ProbeSeen      checksum of what I see there

Afterwards both keep the connection open and silent: its end of file is the news of the other's death.
"""

import socket
import struct
import time

import msgspec

from common.errors import PeerFailed
from common.ids import PeerId
from kvstore.transport.shared_pages import PoolDescription

_LENGTH = struct.Struct("<I")
_MAX_FRAME_BYTES = 16 * 2**20


class Introduce(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Opens a share connection."""

    peer: PeerId


class Offer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The host's answer; the descriptor of the memory travels with it."""

    description: PoolDescription


class NoOffer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The host's other answer: nothing to map now. The guest hangs up."""

    text: str


class ProbeWritten(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The guest wrote into its scratch."""

    n_bytes: int


class ProbeSeen(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The host read it."""

    crc32: int


ShareFrame = Introduce | Offer | NoOffer | ProbeWritten | ProbeSeen
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[ShareFrame] = msgspec.msgpack.Decoder(ShareFrame)


def encode_frame(frame: ShareFrame) -> bytes:
    """Length and MessagePack."""
    body = _encoder.encode(frame)
    return _LENGTH.pack(len(body)) + body


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
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise PeerFailed(f"unreadable share frame of {n_bytes} bytes: {error}") from error
            del self._received[:end]
        return frames


def receive_frame(connection: socket.socket, deadline_s: float) -> tuple[ShareFrame, list[int]]:
    """Wait for one frame and the descriptors that came with it; the caller closes those. Raises PeerFailed.

    `deadline_s` is on time.monotonic's clock.
    """
    reader, fds = FrameReader(), list[int]()
    while True:
        connection.settimeout(max(0.001, deadline_s - time.monotonic()))
        try:
            piece, new_fds, _, _ = socket.recv_fds(connection, 65536, 4)
        except OSError as error:
            raise PeerFailed(f"no answer on the share connection: {error}") from error
        fds += new_fds
        if not piece:
            raise PeerFailed("the share connection was closed by the peer")
        frames = reader.feed(piece)
        if frames:
            return frames[0], fds
