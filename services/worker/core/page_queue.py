"""Requests of prefill workers for pages of a decode worker, until they have them. Pure.

Owns the order in which they wait. One leaves when its pages are taken for it, or when it ends without.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from common.block_hash import BlockHash, hash_blocks
from common.ids import Incarnation, PeerId
from common.kv_layout import KvLayout
from common.messages.handover import Grant, GrantRequest
from kvstore.index.block_pool import BlockPool
from kvstore.index.ledger import PageState
from kvstore.index.page_table import PageTable
from services.worker.core.generation import Arrival
from services.worker.core.incoming_transfer import IncomingTransfer
from services.worker.core.scheduler import Scheduler
from services.worker.core.wire import refusal_of, too_large


@dataclass(frozen=True, slots=True)
class GrantTerms:
    """What every grant of this worker says."""

    layout: KvLayout
    keeps_blocks: bool
    """Whether prompts may share blocks that are cached here."""
    root: Callable[[str], BlockHash]
    """Cache salt -> what the names of blocks start from."""
    epoch: Incarnation
    lease_ms: int
    vocab_tokens: int
    context_tokens: int
    """Prompt plus output may not exceed this."""


class PageQueue:
    """First come first served; preempted sequences come before all of them."""

    def __init__(self, pool: BlockPool, scheduler: Scheduler, terms: GrantTerms) -> None:
        self._pool, self._scheduler, self._terms = pool, scheduler, terms
        self._waiting: deque[IncomingTransfer] = deque()

    def refusal(self, request: GrantRequest) -> tuple[str, str] | None:
        """Code and text of why a request can never be served here; None if it can."""
        if text := refusal_of(request, self._terms.vocab_tokens, self._terms.context_tokens):
            return "invalid_request", text
        if text := self._too_large(request):
            return "out_of_pages", text
        return None

    def add(self, sender: PeerId, request: GrantRequest, now_ms: float) -> IncomingTransfer:
        """A request that is not refused waits behind all others."""
        tokens, root = request.prompt + request.emitted, self._terms.root(request.cache_salt)
        names = hash_blocks(tokens, root, self._terms.layout.block_tokens) if self._terms.keeps_blocks else []
        arrival = Arrival(
            request=request.request,
            gateway=request.gateway,
            tokens=tokens,
            emitted_tokens=len(request.emitted),
            sampling=request.sampling,
            deadline_ms=now_ms + request.timeout_ms,
            root=root,
            names=tuple(names),
            origin=sender,
        )
        self._waiting.append(incoming := IncomingTransfer(arrival, sender, request, since_ms=now_ms))
        return incoming

    def remove(self, incoming: IncomingTransfer) -> None:
        """It ends without pages."""
        self._waiting.remove(incoming)

    def unfit(self) -> list[tuple[IncomingTransfer, str]]:
        """Who needs more pages than there are, and how it is told."""
        return [(one, text) for one in self._waiting if (text := self._too_large(one.request))]

    def serve(self, now_ms: float) -> tuple[IncomingTransfer, Grant] | None:
        """Take pages for the first; None if nobody waits, or not enough are free."""
        self._scheduler.giving_way.no_wish()
        if not self._waiting:
            return None
        arrival = self._waiting[0].arrival
        grows = arrival.sampling.max_tokens > arrival.emitted_tokens + 1  # the last drawn token needs no page
        pinned = self._pool.pinned_run(arrival.names)
        if not self._scheduler.grants(len(arrival.tokens) + grows, pinned_blocks=pinned):
            return None
        incoming = self._waiting.popleft()
        return incoming, self._take_pages(incoming, now_ms)

    def _take_pages(self, incoming: IncomingTransfer, now_ms: float) -> Grant:
        names, layout = incoming.arrival.names, self._terms.layout
        hits, table = self._pool.match(names), PageTable(layout.layers)
        if hits:
            table.append(self._pool.take(incoming.owner, names[:hits]))
        missing = layout.blocks_for(len(incoming.arrival.tokens)) - hits
        granted = self._pool.alloc(incoming.owner, missing, PageState.GRANTED)
        table.append(granted)
        incoming.note_pages(table, hits, now_ms)
        return Grant(
            transfer=incoming.request.transfer,
            epoch=self._terms.epoch,
            first_block=hits,
            pages=tuple(tuple(row) for row in granted.T.tolist()),
            lease_ms=self._terms.lease_ms,
        )

    def _too_large(self, request: GrantRequest) -> str:
        pages = self._terms.layout.pages_at_most(len(request.prompt), request.sampling.max_tokens)
        return too_large(pages, self._pool.usable_pages)
