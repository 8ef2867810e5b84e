"""What a worker core may ask its shell to do, beside the actions of the hand-over (kvstore.handover.actions)."""

from dataclasses import dataclass

from kvstore.handover.actions import Send

from common.ids import PeerId, TransferId
from common.messages.handover import KvSpan
from common.messages.liveness import Member


@dataclass(frozen=True, slots=True)
class Dial:
    """Open a connection to a peer."""

    peer: PeerId
    endpoint: str


@dataclass(frozen=True, slots=True)
class HangUp:
    """Close the connection to a peer and unmap its memory once no copy uses it."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class OpenChannel:
    """Find the fastest working way to move KV to a peer; answer with `on_channel`."""

    peer: PeerId
    member: Member


@dataclass(frozen=True, slots=True)
class Copy:
    """Move one span of KV; answer with `on_copied`. Source pages are ours, target pages the peer's."""

    transfer: TransferId
    to: PeerId
    span: KvSpan
    source_pages: tuple[int, ...]
    target_pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WritePayload:
    """Copy a received payload into our own pages. Done before the next message is handled."""

    pages: tuple[int, ...]
    payload_index: int
    """Which payload frame of the message being handled."""


Action = Send | Dial | HangUp | OpenChannel | Copy | WritePayload
