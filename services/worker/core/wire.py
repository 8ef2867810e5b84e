"""What peers say about pages and blocks, checked before anybody acts on it. Pure."""

from collections.abc import Callable, Sequence

import numpy as np

from common.block_hash import HASH_BYTES, BlockHash
from common.errors import ProtocolViolation
from common.ids import RequestId
from common.messages.base import Message
from common.messages.blocks import Found
from common.messages.handover import GrantRequest
from common.messages.requests import Failed, Generate, NotHere, StillHere, Tokens
from common.messages.sampling_ranges import out_of_range
from kvstore.index.ledger import PageIds

TIERS = ("device", "host", "disk")
PEER_TIER = "peer"
"""Where a worker counts what it fetched from the `device` tier of another one."""
_MAX_PAGE = 2**31 - 1


def page_rows(rows: Sequence[Sequence[int]], layers: int) -> PageIds:
    """Rows of one page per layer as an array [blocks, layers]. Raises ProtocolViolation for anything else."""
    for row in rows:
        if len(row) != layers or min(row) < 0 or max(row) > _MAX_PAGE:
            raise ProtocolViolation(f"a block's pages {tuple(row)[:4]}...: {layers} page numbers were expected")
    return np.array(rows, np.int32).reshape(len(rows), layers)


def block_names(names: Sequence[bytes]) -> list[BlockHash]:
    """Names of blocks. Raises ProtocolViolation for one that is none."""
    if any(len(name) != HASH_BYTES for name in names):
        raise ProtocolViolation(f"a block's name has {HASH_BYTES} bytes")
    return [BlockHash(name) for name in names]


def require_answer(message: Found, asked: int, *, by_pages: bool, layers: int) -> PageIds:
    """Raise ProtocolViolation unless this answers a Find of `asked` blocks; returns the pages, no rows if bytes follow."""
    if not 0 <= message.n_blocks <= asked or not set(message.tiers) <= set(TIERS):
        raise ProtocolViolation(
            f"Found {message.call}: {message.n_blocks} blocks of {asked}, tiers {message.tiers[:4]}"
        )
    if len(message.tiers) != message.n_blocks:
        raise ProtocolViolation(f"Found {message.call}: {message.n_blocks} blocks and {len(message.tiers)} tiers")
    pages = page_rows(message.pages, layers)
    if by_pages and len(pages) != message.n_blocks:
        raise ProtocolViolation(f"Found {message.call}: {message.n_blocks} blocks and {len(pages)} rows of pages")
    return pages


def requests_of(message: Message) -> tuple[RequestId, ...]:
    """Whose tokens, or whose end, a message to a gateway tells."""
    if isinstance(message, Tokens):
        return tuple(delta.request for delta in message.deltas)
    return (message.request,) if isinstance(message, Failed) else ()


def answers_about(requests: Sequence[RequestId], has: Callable[[RequestId], bool]) -> list[StillHere | NotHere]:
    """What to say to AskAbout: of every request that it names, whether it is here."""
    known = [has(request) for request in requests]
    here = tuple(request for request, is_known in zip(requests, known, strict=True) if is_known)
    gone = tuple(request for request, is_known in zip(requests, known, strict=True) if not is_known)
    return ([StillHere(requests=here)] if here else []) + ([NotHere(requests=gone)] if gone else [])


def refusal_of(message: Generate | GrantRequest, vocab_tokens: int, context_tokens: int) -> str:
    """Why what a request brings is no prompt, or no beginning of its answer, or too long; empty if it can be served.

    `context_tokens`: of prompt and answer at the most. An answer that would grow longer ends there; a prompt must leave it
    one token.
    """
    emitted, sampling = message.emitted, message.sampling
    if not are_tokens(message.prompt, vocab_tokens):
        return f"a prompt holds one token or more of 0 to {vocab_tokens - 1}; this one does not"
    if emitted and not are_tokens(emitted, vocab_tokens):
        return f"emitted tokens are of 0 to {vocab_tokens - 1}; some of these are not"
    if wrong := out_of_range(sampling, vocab_tokens):
        return wrong
    if len(message.prompt) + len(emitted) >= context_tokens:
        given = f"{len(message.prompt)} prompt tokens" + (f" and {len(emitted)} emitted ones" if emitted else "")
        return (
            f"{given} leave no room for an answer: this worker takes {context_tokens} tokens in all, "
            f"by --max-context-tokens={context_tokens} or its model"
        )
    if emitted and len(emitted) >= sampling.max_tokens:
        return (
            f"{len(emitted)} tokens were emitted already; with max_tokens={sampling.max_tokens} nothing is left to do"
        )
    if not set(emitted).isdisjoint(sampling.stop_token_ids):
        return "the emitted tokens hold a stop token: that answer had ended"
    return ""


def are_tokens(prompt: Sequence[int], vocab_tokens: int) -> bool:
    """Whether a prompt is one: at least one token, and each in the vocabulary."""
    return bool(prompt) and min(prompt) >= 0 and max(prompt) < vocab_tokens


def too_large(pages: int, total_pages: int) -> str:
    """Why a request that grows to so many pages is never served here; empty if it can be."""
    if pages <= total_pages:
        return ""
    return (
        f"the request needs up to {pages} pages; this worker has {total_pages} in all for KV (--device-memory, with "
        "--elastic less what steps keep): ask for fewer tokens, or give it more memory"
    )
