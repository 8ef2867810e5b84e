"""What the hand-over cores tell their shell to do, in the order given."""

from dataclasses import dataclass

from common.ids import PeerId, TransferId
from common.messages.actions import Send
from common.messages.handover import GrantRequest, HandOver, KvSpan


@dataclass(frozen=True, slots=True)
class GaveUp:
    """Both sides, at most once per transfer: it will not succeed. Who owns the request should hear of it.

    `phase` is one of those of messages.requests.Failed.
    """

    transfer: TransferId
    phase: str
    code: str
    text: str
    retryable: bool
    unanswered: bool = False
    """Sender: no answer came at all; whoever asks that decode worker next would wait as long."""


@dataclass(frozen=True, slots=True)
class Release:
    """Both sides, the pages of this transfer may be reused: nobody writes (receiver) or reads (sender) them any more.

    Receiver: exactly once per opened transfer that is not delivered. Sender: exactly once per transfer asked for.
    """

    transfer: TransferId


@dataclass(frozen=True, slots=True)
class Asked:
    """Receiver: a new request for pages. Answer with `open` or `refuse`, now or when pages are free."""

    sender: PeerId
    request: GrantRequest


@dataclass(frozen=True, slots=True)
class Fill:
    """Receiver, tcp only: write payload number `payload` of the message being handled into these pages.

    `pages` are in the order of the span, as in PostCopy.
    """

    transfer: TransferId
    span: KvSpan
    pages: tuple[int, ...]
    payload: int


@dataclass(frozen=True, slots=True)
class Deliver:
    """Receiver: all KV and the first token are here; the pages belong to the request now."""

    transfer: TransferId
    handover: HandOver


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Receiver: given up, but a writer may be writing. Keep the pages from everybody until Release."""

    transfer: TransferId


ReceiverAction = Send | GaveUp | Release | Asked | Fill | Deliver | Quarantine


@dataclass(frozen=True, slots=True)
class Granted:
    """Sender: pages are there; blocks before `first_block` need not be sent."""

    transfer: TransferId
    first_block: int


@dataclass(frozen=True, slots=True)
class PostCopy:
    """Sender: start this copy and report its end with `copied`, whatever happens.

    `target_pages`: block by block, all the span's layers of one block, then of the next.
    """

    transfer: TransferId
    to: PeerId
    span: KvSpan
    target_pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HandedOver:
    """Sender: the decode worker has the request."""

    transfer: TransferId


SenderAction = Send | GaveUp | Release | Granted | PostCopy | HandedOver
