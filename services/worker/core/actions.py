"""What a worker core may ask its shell to do, beside the actions of the hand-over (kvstore.handover.actions)."""

from collections.abc import Callable
from dataclasses import dataclass

from common.ids import Owner, PeerId
from common.messages.actions import Dial, HangUp, Send
from common.messages.blocks import Found, Put
from common.messages.liveness import Member
from kvstore.handover.actions import Fill, PostCopy
from kvstore.index.ledger import PageIds


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


@dataclass(frozen=True, slots=True, eq=False)
class FetchBlocks:
    """Copy whole blocks from a peer's shared memory into ours; both page arrays are [blocks, layers].

    Answer with `on_blocks_moved`, whatever happens; `by_layer`: layer after layer, each answered with
    `on_layer_fetched`. What ends after `deadline_ms` (our clock) has failed: the peer may have reused its pages.
    """

    call: int
    peer: PeerId
    own_pages: PageIds
    peer_pages: PageIds
    deadline_ms: float
    by_layer: bool
    layers: tuple[int, ...] = ()
    """Which layers the columns are, rising; none named: all of them."""


@dataclass(frozen=True, slots=True, eq=False)
class StoreBlocks:
    """Copy whole blocks from our pages into a peer's shared memory; answer with `on_blocks_moved`, whatever happens."""

    call: int
    peer: PeerId
    own_pages: PageIds
    peer_pages: PageIds
    ring: int | None = None
    """The ring that these pages are a row of: when the copy has ended, well or not, the row may be written again."""
    free_layer: int | None = None
    """Up to which layer the ring may be written then; None: it is over."""


@dataclass(frozen=True, slots=True)
class BeginRing:
    """A step begins whose layers share pages: hold the engine back before it writes a layer behind `free_layer`, until
    StoreBlocks of this ring or OpenRing say that more may be written."""

    ring: int
    free_layer: int


@dataclass(frozen=True, slots=True)
class OpenRing:
    """The same for a ring whose layers are copied otherwise, or by nobody any more. Of a ring that is over: nothing."""

    ring: int
    free_layer: int | None
    """Up to which layer it may be written now; None: it is over."""


@dataclass(frozen=True, slots=True, eq=False)
class FillBlocks:
    """Write the payloads of the message being handled, one per block, into our pages [blocks, layers]."""

    own_pages: PageIds


@dataclass(frozen=True, slots=True, eq=False)
class SendBlocks:
    """Send a message, followed by one payload per block of our pages [blocks, layers]."""

    to: PeerId
    message: Found | Put
    pages: PageIds


@dataclass(frozen=True, slots=True)
class Moved:
    """How the shell fared with a Copy, FetchBlocks or StoreBlocks."""

    ok: bool
    elapsed_ms: float = 0.0
    n_copies: int = 0
    """Runs that were one piece of memory on both sides."""
    n_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ResizeMemory:
    """Have memory for so many pages; answer with `on_memory`, when everybody who maps it knows, or it failed."""

    n_pages: int


@dataclass(frozen=True, slots=True)
class LendChunks:
    """Nobody uses the pages of these chunks of memory: move it to `to`, in this order.

    `to` is ACTIVATIONS, and they become the end of the arena, or SYSTEM.
    """

    chunks: tuple[int, ...]
    to: Owner


@dataclass(frozen=True, slots=True)
class TakeBackChunks:
    """Make these chunks pages again.

    Those of ACTIVATIONS are the arena's last, and no step in flight needs them; those of SYSTEM are answered with
    `on_chunks_back`.
    """

    chunks: tuple[int, ...]
    owner: Owner


CarryOut = Callable[[LendChunks | TakeBackChunks], str]
"""Moves chunks of memory at once, all or none, while the core decides: to map them may fail, and what it decides next depends
on that. Returns why it failed; empty: it did not."""


def always_moves(order: LendChunks | TakeBackChunks) -> str:
    """Where there is no memory that could fail."""
    return ""


Action = (
    Send
    | Fill
    | Dial
    | HangUp
    | OpenChannel
    | Copy
    | FetchBlocks
    | StoreBlocks
    | BeginRing
    | OpenRing
    | FillBlocks
    | SendBlocks
    | ResizeMemory
)
