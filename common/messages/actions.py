"""What every pure core may ask of the sockets around it. Each core's own module adds the rest."""

from dataclasses import dataclass

from common.ids import PeerId
from common.messages.base import Message


@dataclass(frozen=True, slots=True)
class Dial:
    """Open a connection to a peer."""

    peer: PeerId
    endpoint: str


@dataclass(frozen=True, slots=True)
class HangUp:
    """Close the connection to a peer, and let go of everything that hangs on it."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Send:
    """Queue a message. One that cannot be queued comes back as `on_unsent`, where a core has that event.

    KvSent over tcp travels with the payload of the copy that it announces.
    """

    to: PeerId
    message: Message
