"""What the gateway's cores ask their shell to do."""

from dataclasses import dataclass

from common.errors import ServingError
from common.ids import PeerId, RequestId
from common.messages.base import Message
from common.messages.requests import TokenDelta


@dataclass(frozen=True, slots=True)
class Dial:
    """Open a connection."""

    peer: PeerId
    endpoint: str


@dataclass(frozen=True, slots=True)
class HangUp:
    """Close a connection."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Send:
    """Queue a message; one that cannot be queued comes back through `on_unsent`."""

    peer: PeerId
    message: Message


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
class Note:
    """Something an operator wants to read in the log."""

    event: str
    worker: str
    text: str


Action = Dial | HangUp | Send | Deliver | End | Note
