"""What the gateway's cores ask their shell to do."""

from dataclasses import dataclass

from common.errors import ServingError
from common.ids import PeerId, RequestId
from common.messages.actions import Dial, HangUp, Send
from common.messages.requests import TokenDelta
from common.messages.resizing import ResizeAnswer
from gateway.core.open_request import FailedAttempt
from gateway.core.placed import Placed


@dataclass(frozen=True, slots=True)
class Deliver:
    """Tokens that the request has not seen yet, in order and without gaps. A delta with `finish` is its last."""

    request: RequestId
    delta: TokenDelta


@dataclass(frozen=True, slots=True)
class End:
    """The request ends without a full answer; nothing comes after it."""

    request: RequestId
    error: ServingError


@dataclass(frozen=True, slots=True)
class Routed:
    """Where a request that asked for it was sent, and why; comes again with every attempt."""

    request: RequestId
    placed: Placed
    attempt: int


@dataclass(frozen=True, slots=True)
class Begun:
    """An attempt that goes to workers now."""

    request: RequestId
    placed: Placed
    begun_ms: float
    """When its workers were about to be chosen."""
    failed: tuple[FailedAttempt, ...] = ()
    """The latest attempts before it."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something an operator wants to read in the log."""

    event: str
    worker: str
    text: str


@dataclass(frozen=True, slots=True)
class Resized:
    """A worker says what became of an order to change its memory."""

    worker: PeerId
    answer: ResizeAnswer


Action = Dial | HangUp | Send | Deliver | End | Routed | Note | Resized
