"""The KV of answers on its way back to the worker that computed the prompt (caching level 3). Pure.

The decode worker offers what it holds when a request has finished; the prefill worker pulls it if it has room:

    Offered -> Find -> Found -> copy -> visible in our cache -> Release          or Declined

Best effort (MemServe, section 5.2): an answer that does not come back is computed again with the next turn. Owns one
`_Pull` per offer taken, with pages of its own, until it is published or given up.
"""

from dataclasses import dataclass

from common.block_hash import BlockHash
from common.ids import Owner, PeerId
from common.messages.actions import Send
from common.messages.blocks import Declined, Find, Found, Offered, Release
from kvstore.index.block_pool import BlockPool
from kvstore.index.ledger import PageIds, PageState
from services.worker.core.actions import Action, FetchBlocks, FillBlocks, Moved
from services.worker.core.calls import Calls
from services.worker.core.wire import block_names, require_answer

_LEASE_MS = 5_000
_FOUND_WITHIN_MS = 2_000.0
_MAX_PULLS = 16


@dataclass(slots=True)
class _Pull:
    owner: Owner
    peer: PeerId
    parent: BlockHash
    depth: int
    names: list[BlockHash]
    shared: bool
    sent_ms: float
    own_pages: PageIds | None = None
    """[blocks, layers] once it is being copied; then the shell ends it."""


class Returns:
    """The prefill worker's side."""

    def __init__(self, pool: BlockPool, calls: Calls, block_bytes: int, *, accepts: bool) -> None:
        """`accepts`: whether this worker keeps anything; if not it declines every offer."""
        self._accepts = accepts
        self._pool, self._calls, self._block_bytes = pool, calls, block_bytes
        self._pulls: dict[int, _Pull] = {}
        self.returned_blocks_total = 0
        self.returned_bytes_total = 0
        self.declined_blocks_total = 0

    def on_offered(
        self, peer: PeerId, message: Offered, *, shared: bool, spare_pages: int, now_ms: float
    ) -> list[Action]:
        """Pull what is missing here, or decline. `spare_pages`: what waiting prompts do not need of the pool."""
        names = block_names(message.blocks)
        parent = BlockHash(message.parent)
        known = self._pool.match(names)
        missing = names[known:]
        if not missing:
            return []
        linked = known > 0 or parent in self._pool.cache or message.depth == 0
        fits = len(missing) * self._pool.pages_per_block <= spare_pages
        if not (self._accepts and linked and fits and len(self._pulls) < _MAX_PULLS):
            self.declined_blocks_total += len(missing)
            return [Send(peer, Declined(call=message.call))]
        call = self._calls.next()
        before = names[known - 1] if known else parent
        owner = Owner(f"return/{call}")
        self._pulls[call] = _Pull(owner, peer, before, message.depth + known, missing, shared, now_ms)
        return [Send(peer, Find(call=call, blocks=tuple(missing), lease_ms=_LEASE_MS, payloads=not shared))]

    def awaits(self, name: BlockHash) -> bool:
        """Whether this block is on its way here."""
        return any(name in pull.names for pull in self._pulls.values())

    def on_found(self, peer: PeerId, message: Found) -> list[Action] | None:
        """The decode worker's answer; None if the call is not ours."""
        pull = self._pulls.get(message.call)
        if pull is None or pull.own_pages is not None or pull.peer != peer:
            return None
        theirs = require_answer(message, len(pull.names), by_pages=pull.shared, layers=self._pool.pages_per_block)
        n_blocks = message.n_blocks
        release = Send(peer, Release(call=message.call))
        if n_blocks * self._pool.pages_per_block > self._pool.available_pages:
            n_blocks = 0
        if n_blocks == 0:
            del self._pulls[message.call]
            return [release]
        pull.names = pull.names[:n_blocks]
        pages = self._pool.alloc(pull.owner, n_blocks, PageState.RESERVED)
        if not pull.shared:
            filled: list[Action] = [FillBlocks(pages)]
            pull.own_pages = pages
            return filled + self._end(message.call, ok=True, n_bytes=n_blocks * self._block_bytes)
        pull.own_pages = pages
        deadline_ms = pull.sent_ms + message.lease_ms
        return [FetchBlocks(message.call, peer, pages, theirs, deadline_ms, by_layer=False)]

    def uses(self, call: int) -> bool:
        """Whether what was found under this call is being copied."""
        return call in self._pulls

    def on_moved(self, call: int, moved: Moved, now_ms: float) -> list[Action] | None:
        """The shell has ended a copy; None if the call is not ours."""
        return self._end(call, ok=moved.ok, n_bytes=moved.n_bytes) if call in self._pulls else None

    def _end(self, call: int, *, ok: bool, n_bytes: int) -> list[Action]:
        pull = self._pulls.pop(call)
        if ok and pull.own_pages is not None:
            self._pool.publish(pull.owner, pull.names, pull.own_pages, parent=pull.parent, depth=pull.depth)
            self.returned_blocks_total += len(pull.names)
            self.returned_bytes_total += n_bytes
        self._pool.release(pull.owner)
        return [Send(pull.peer, Release(call=call))]

    def on_tick(self, now_ms: float) -> None:
        """Wait no longer for answers that are late."""
        for call, pull in list(self._pulls.items()):
            if pull.own_pages is None and now_ms - pull.sent_ms >= _FOUND_WITHIN_MS:
                del self._pulls[call]

    def on_peer_dead(self, peer: PeerId) -> None:
        """The decode worker is gone; a copy in progress ends by itself."""
        for call, pull in list(self._pulls.items()):
            if pull.peer == peer and pull.own_pages is None:
                del self._pulls[call]

    @property
    def n_open(self) -> int:
        """Pulls that have not ended."""
        return len(self._pulls)
