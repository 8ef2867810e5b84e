"""Everything that crosses a socket, as one union, and its MessagePack encoding."""

import msgspec

from common.errors import ProtocolViolation
from common.messages.base import Message
from common.messages.blocks import (
    Declined,
    Find,
    Found,
    Offered,
    Publish,
    Put,
    Release,
    Reserve,
    Reserved,
    Stored,
)
from common.messages.handover import (
    Abort,
    Commit,
    Grant,
    GrantPending,
    GrantRefused,
    GrantRequest,
    HandOver,
    KvSent,
    Probe,
    Probed,
    Renew,
    Stop,
    Stopped,
)
from common.messages.liveness import Drain, Hello, Ping, Refused, Report, Welcome
from common.messages.requests import AskAbout, Cancel, Failed, Generate, NotHere, StillHere, Tokens
from common.messages.resizing import Resize, ResizeAnswer

RequestMessage = Generate | Cancel | Tokens | Failed | AskAbout | StillHere | NotHere
HandoverMessage = (
    GrantRequest
    | Grant
    | GrantPending
    | GrantRefused
    | KvSent
    | HandOver
    | Commit
    | Stop
    | Stopped
    | Abort
    | Renew
    | Probe
    | Probed
)
LivenessMessage = Hello | Welcome | Refused | Ping | Report | Drain
ResizeMessage = Resize | ResizeAnswer
BlockMessage = Reserve | Reserved | Publish | Put | Stored | Find | Found | Release | Offered | Declined
AnyMessage = RequestMessage | HandoverMessage | LivenessMessage | ResizeMessage | BlockMessage

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """One MessagePack frame."""
    return _encoder.encode(message)


def decode(frame: bytes | memoryview) -> AnyMessage:
    """Parse one frame. Raises ProtocolViolation and nothing else on bad input."""
    try:
        return _decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolViolation(f"unreadable frame of {len(frame)} bytes: {error}") from error
