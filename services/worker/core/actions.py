"""What a worker core may ask its shell to do, beside the actions of the hand-over (kvstore.handover.actions)."""

from dataclasses import dataclass

from common.ids import PeerId
from common.messages.actions import Dial, HangUp, Send
from common.messages.liveness import Member
from kvstore.handover.actions import Fill, PostCopy


@dataclass(frozen=True, slots=True)
class OpenChannel:
    """Find the fastest working way to move KV to a peer; answer with `on_channel`."""

    peer: PeerId
    member: Member


@dataclass(frozen=True, slots=True)
class Copy:
    """Move one span of KV from our pages into a peer's; answer with `on_copied`, whatever happens."""

    order: PostCopy
    source_pages: tuple[int, ...]


Action = Send | Fill | Dial | HangUp | OpenChannel | Copy
