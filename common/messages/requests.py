"""Messages of one request, between the gateway that owns it and the workers that serve it.

gateway -> prefill | mixed          Generate   compute this prompt (and, on a mixed worker, the answer)
gateway -> every worker it named    Cancel     stop, free everything; unknown ids are remembered for a while
decode | mixed -> gateway           Tokens     new tokens of many requests, one message per engine step
any worker -> gateway               Failed     this request ends here, and why
gateway -> any worker               AskAbout   there was no news of these for a while: are they there?
any worker -> gateway               StillHere  the answer: which of them are
any worker -> gateway               NotHere    the answer: which of them are not
"""

import msgspec

from common.ids import PeerId, RequestId, TransferId, WorkerId
from common.messages.base import Message


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens. The random number of output position t depends on (seed, t) alone."""

    max_tokens: int
    temperature: float = 0.0
    """0 is greedy; otherwise logits are divided by it."""
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    """Always set: the gateway draws one for a client that gave none, so that any worker continues alike."""
    stop_token_ids: tuple[int, ...] = ()
    """Client's stop ids and, unless `ignore_eos`, the model's end-of-sequence ids. Never emitted as text."""
    logprobs: int | None = None
    """None: off. n: the chosen token's log-probability and those of the n likeliest."""


class FetchHint(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks that another worker holds in its device pool. Advice: they may be gone."""

    holder: PeerId
    n_blocks: int
    """Leading blocks of the prompt that it holds."""


class Generate(Message, frozen=True, kw_only=True):
    """A whole request. Sent by its owner, the gateway, to a prefill or a mixed worker."""

    request: RequestId
    prompt: tuple[int, ...]
    sampling: Sampling
    timeout_ms: int
    """Time the request still has, counted on the receiver's clock from receipt."""
    decode: WorkerId | None = None
    """Decode worker to hand over to; None: the receiver generates the answer itself."""
    model: str = ""
    cache_salt: str = ""
    """Requests with different salts share no cached KV; the client's choice, for instance one per tenant."""
    emitted: tuple[int, ...] = ()
    """Tokens of the answer that the client has already, from a worker that failed: the answer goes on behind them. They
    count towards `max_tokens`, and the first new token has output position len(emitted)."""
    fetch: FetchHint | None = None
    """Where a longer prefix lies than the receiver's own, worth fetching by what the gateway knows."""
    priority: int = 0
    """Lower goes first among prompts that wait; equals in order of arrival."""
    decode_peer: PeerId | None = None
    """The life of `decode` that the gateway speaks with: no other one's tokens would be heard. None: any."""


class Cancel(Message, frozen=True, kw_only=True):
    """The request is over for its owner. Idempotent; needs no answer."""

    request: RequestId


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probabilities at one position, before temperature, penalties and truncation."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens, best first."""


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Where a worker's share of the time went, in milliseconds. Each part is a difference of two readings of one clock.

    Up to the first token they follow one another: prefill_queue, compute, grant_wait, transfer. `decode_queue` and
    `first_step` come behind it, and only for requests that were handed over: their first token leaves with the
    hand-over, so these two are the time from there to the second token. Where one worker does both, the last step of
    `compute` draws the first token.
    """

    prefill_queue_ms: float = 0.0
    """From hearing Generate to the start of the first step that computes its prompt: turn, lookups, room for its KV."""
    grant_wait_ms: float = 0.0
    """What waiting for pages added after the prompt was computed; before that it costs nothing."""
    compute_ms: float = 0.0
    """From the start of its first step to the end of its last: also what came between them, and fetches that they waited
    for."""
    transfer_ms: float = 0.0
    """What the transfer added after the last layer was computed and pages were granted, and on the decode worker between
    the hand-over and the last page. What lies in sockets is the gateway's `wire`."""
    decode_queue_ms: float = 0.0
    """From the hand-over to the start of the step that draws the second token."""
    first_step_ms: float = 0.0
    """That step."""


class TokenDelta(msgspec.Struct, frozen=True, array_like=True):
    """What one engine step gave one request."""

    request: RequestId
    position: int
    """Output index of the first token in `tokens`; lets the receiver drop repeats."""
    tokens: tuple[int, ...]
    finish: str | None = None
    """None: more will come. `stop` (an end or stop id, the last of `tokens`) or `length`."""
    logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int | None = None
    """With the first delta only: prompt tokens that were not computed again."""
    timings: Timings | None = None
    """With the first delta: the parts up to its token. With the second one of a handed-over request: `decode_queue` and
    `first_step`, and nothing else."""


class Tokens(Message, frozen=True, kw_only=True):
    """All tokens of one engine step that belong to one gateway."""

    deltas: tuple[TokenDelta, ...]


class Failed(Message, frozen=True, kw_only=True):
    """The request ends here without an answer. Everything it held on the sender is given back."""

    request: RequestId
    code: str
    """A `code` of common.errors."""
    phase: str
    """prefill_queue, grant, prefill, transfer, decode_queue or decode."""
    text: str
    retryable: bool
    transfer: TransferId | None = None
    timings: Timings | None = None
    """The sender's parts up to the end; None where it knows none."""


class AskAbout(Message, frozen=True, kw_only=True):
    """No news came of these requests for a while, or they were cancelled. Asked again as long as none comes.

    Each of them is answered for, by StillHere or NotHere: silence means that messages are lost.
    """

    requests: tuple[RequestId, ...]


class StillHere(Message, frozen=True, kw_only=True):
    """Of the requests that were asked about, these are here: tokens of them, or Failed, will come."""

    requests: tuple[RequestId, ...]


class NotHere(Message, frozen=True, kw_only=True):
    """Of the requests that were asked about, these are unknown, or over, here: no word of them will follow this one."""

    requests: tuple[RequestId, ...]
