"""Messages of one KV hand-over, in the order they travel.

    prefill -> decode    GrantRequest  this request's turn is near; give me pages for its prompt
    decode  -> prefill   GrantPending  I have heard that already: it is in my queue for pages
    decode  -> prefill   Grant         these pages are yours to fill until the lease ends
    decode  -> prefill   GrantRefused  no, and why
    prefill -> decode    KvSent        these (layer, blocks) are complete; repeats are harmless
    prefill -> decode    HandOver      all of them are, and here is the first token
    decode  -> prefill   Commit        the request lives here now; you may drop your copy
    decode  -> prefill   Stop          stop writing; answer Stopped when no write is in flight any more
    prefill -> decode    Stopped       no write of mine is in flight any more
    prefill -> decode    Abort         I gave up, and no write of mine is in flight any more
    prefill -> decode    Renew         I am alive and still need these leases

    prefill -> decode    Probe         before all that, over tcp: here is a test payload
    decode  -> prefill   Probed        it arrived, with this checksum

The owner of the memory is the granting decode worker, always. `epoch` is its incarnation; writes
announced with another epoch are refused. A message about a closed transfer is answered with Stop
(from prefill) or ignored (from decode), so a lost message costs one round trip, never a page.
"""

import msgspec

from common.ids import Incarnation, PeerId, RequestId, TransferId
from common.messages.base import Message
from common.messages.requests import Sampling, Timings, TokenLogprob


class GrantRequest(Message, frozen=True, kw_only=True):
    """Asks for pages, and carries all that the decode worker needs to know of the request."""

    transfer: TransferId
    request: RequestId
    gateway: PeerId
    """Who owns the request: where the decode worker sends its tokens."""
    prompt: tuple[int, ...]
    sampling: Sampling
    timeout_ms: int
    """Time the request still has, counted on the receiver's clock from receipt."""
    transport: str = "shm"
    """`shm` and `cuda_ipc` (the sender writes into our memory) or `tcp` (payloads come with KvSent)."""
    cache_salt: str = ""
    """As in Generate: under which names the decode worker finds and keeps this request's blocks."""
    emitted: tuple[int, ...] = ()
    """As in Generate: the pages asked for are those of prompt and emitted tokens together."""


class Grant(Message, frozen=True, kw_only=True):
    """Permission to fill the sender's pages."""

    transfer: TransferId
    epoch: Incarnation
    first_block: int
    """Token block that the first column of `pages` holds; blocks before it are already here."""
    pages: tuple[tuple[int, ...], ...]
    """[layer][block - first_block]: page ids in the granting worker's pool."""
    lease_ms: int
    """Counted on the receiver's clock from receipt; Renew starts it anew."""


class GrantPending(Message, frozen=True, kw_only=True):
    """Answers a repeated GrantRequest: the transfer waits for pages, and so may its sender."""

    transfer: TransferId


class GrantRefused(Message, frozen=True, kw_only=True):
    """No pages for this transfer, now or ever."""

    transfer: TransferId
    code: str
    text: str
    retryable: bool


class KvSpan(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive token blocks of one layer, or of several layers at once.

    Pages and payloads of a span go block by block: all its layers of the first block, then of the next.
    """

    layer: int
    first_block: int
    n_blocks: int
    n_layers: int = 1


class KvSent(Message, frozen=True, kw_only=True):
    """These spans are written (shm), or their bytes follow as payload frames, one per span (tcp)."""

    transfer: TransferId
    epoch: Incarnation
    spans: tuple[KvSpan, ...]
    checksums: tuple[tuple[int, ...], ...] = ()
    """[span][page in the span's order] crc32 of each page as the sender has it; empty: not made."""
    serial: int = 0
    """Rises from one to the next that carries checksums: of two that name a page the greater counts. 0: as they come."""


class HandOver(Message, frozen=True, kw_only=True):
    """The prompt is computed and all its KV was sent. Carries the first token and sampling state."""

    transfer: TransferId
    epoch: Incarnation
    first_token: int
    logprob: TokenLogprob | None = None
    cached_tokens: int = 0
    timings: Timings = Timings()


class Commit(Message, frozen=True, kw_only=True):
    """The decode worker owns the request now; the sender may drop its copy."""

    transfer: TransferId


class Stop(Message, frozen=True, kw_only=True):
    """Stop writing for this transfer. Repeated until Stopped comes or the sender is known dead."""

    transfer: TransferId
    code: str


class Stopped(Message, frozen=True, kw_only=True):
    """No write of this transfer is in flight, and none will start."""

    transfer: TransferId


class Abort(Message, frozen=True, kw_only=True):
    """The sender gave the transfer up; as with Stopped, no write is in flight."""

    transfer: TransferId
    code: str


class Renew(Message, frozen=True, kw_only=True):
    """Renews the leases of these transfers; those not listed run out."""

    transfers: tuple[TransferId, ...]


class Probe(Message, frozen=True, kw_only=True):
    """tcp, once per connection: a test payload follows; answered by Probed."""

    nonce: int


class Probed(Message, frozen=True, kw_only=True):
    """The payload of Probe `nonce` arrived, with this checksum."""

    nonce: int
    crc32: int
