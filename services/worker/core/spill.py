"""Cached blocks on their way to the KV store. Pure.

    write-through   every block, as soon as it is visible
    selective       every block that was used again: what is never asked for twice is not worth the copy
    write-back      the coldest blocks, when free pages run low or a prefill worker's next prompt needs their pages (it
                    waits for the copy); they leave the cache with it. What running answers displace is not saved.

One batch is on its way at a time: Reserve -> Reserved -> copy -> Publish -> Stored by shared memory, Put -> Stored by
message. Its blocks are pinned (or withdrawn from the cache) under an owner of its own until the copy has ended, whatever
became of the store meanwhile; a batch without an answer is given up after `_ANSWER_WITHIN_MS`. Publish is said until it
is answered (services.worker.core.publishing).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from common.block_hash import BlockHash
from common.ids import Owner, PeerId
from common.messages.actions import Send
from common.messages.blocks import BlockName, Put, Reserve, Reserved, Stored
from kvstore.index.block_pool import Block, BlockPool
from kvstore.index.ledger import PageIds
from services.worker.core.actions import Action, Moved, SendBlocks, StoreBlocks
from services.worker.core.calls import Calls
from services.worker.core.neighbours import BlockLink
from services.worker.core.publishing import Publishing
from services.worker.core.wire import page_rows

SPILL_POLICIES = ("write-through", "write-back", "selective")
_BATCH_BLOCKS = 16
_QUEUED_BLOCKS = 8192
_ANSWER_WITHIN_MS = 2_000.0
_WANTED_MS = 200.0
"""How long the room that a prompt asked for is kept in mind; it asks again while it waits."""
_DISTRUST_MS = 5_000.0
"""After a batch without an answer no prompt waits for another one."""
_LOW_WATER = 0.1
"""write-back: the part of the pool that should be free."""


@dataclass(slots=True)
class _Batch:
    owner: Owner
    store: BlockLink
    blocks: tuple[BlockName, ...]
    own_pages: PageIds
    until_ms: float
    copying: bool = False
    """The shell reads our pages: they stay until it says that it has ended."""
    written: int = 0
    """Blocks that the store lacked."""
    copied: bool = False
    """The copy has ended; only the store's answer is missing."""


class Spiller:
    """A PoolListener. Owns the queue of block names, the batch on its way, and the last words of those before it."""

    def __init__(self, pool: BlockPool, calls: Calls, policy: str) -> None:
        if policy not in SPILL_POLICIES:
            raise ValueError(f"{policy!r} is not one of {', '.join(SPILL_POLICIES)}")
        self._pool, self._calls, self._policy = pool, calls, policy
        self._queue: dict[BlockHash, None] = {}
        self._batches: dict[int, _Batch] = {}
        self._publishing = Publishing()
        self._wanted_free_blocks, self._wanted_until_ms = 0, float("-inf")
        self._distrusted_until_ms = float("-inf")
        self.spilled_blocks_total = 0
        self.spilled_bytes_total = 0
        self.lost_blocks_total = 0
        """Blocks of batches that failed."""

    # -- what to spill

    def on_stored(self, block: Block) -> None:
        """A block became visible."""
        if self._policy == "write-through":
            self.enqueue((block.name,))

    def on_used(self, block: Block) -> None:
        """A block was used again."""
        if self._policy == "selective":
            self.enqueue((block.name,))

    def on_removed(self, block: Block) -> None:
        """A block left the cache before its turn."""
        self._queue.pop(block.name, None)

    def enqueue(self, names: Sequence[BlockHash]) -> None:
        """Spill these when their turn comes; if too many wait, not at all: of a chain the end is the smaller loss."""
        for name in names:
            if len(self._queue) < _QUEUED_BLOCKS:
                self._queue[name] = None

    def make_room(self, n_blocks: int, store: BlockLink | None, now_ms: float) -> bool:
        """write-back: False while blocks that must go for `n_blocks` new ones are being saved; ask again later.

        True at once if there is room, nobody to give blocks to, nothing that could go, or if a batch failed of late.
        """
        savable = store is not None and now_ms >= self._distrusted_until_ms
        if self._policy != "write-back" or n_blocks <= self._free_blocks or not savable:
            return True
        self._wanted_free_blocks, self._wanted_until_ms = n_blocks, now_ms + _WANTED_MS
        return not (self._batches or self._pool.cache.n_evictable)

    @property
    def _free_blocks(self) -> int:
        return self._pool.ledger.free_pages // self._pool.pages_per_block

    # -- the batch on its way

    def pump(self, store: BlockLink | None, now_ms: float) -> list[Action]:
        """Start the next batch if none is on its way and there is something to spill."""
        if self._batches:
            return []
        if store is None:
            self._queue.clear()  # nobody to give them to; what is used later comes by again
            return []
        call = self._calls.next()
        owner = Owner(f"spill/{call}")
        blocks = self._choose(owner, now_ms)
        if not blocks:
            return []
        names = tuple(BlockName(block.name, block.parent, block.depth) for block in blocks)
        own_pages = np.stack([block.place for block in blocks])
        self._batches[call] = _Batch(owner, store, names, own_pages, now_ms + _ANSWER_WITHIN_MS)
        if store.shared:
            return [Send(store.peer, Reserve(call=call, blocks=names))]
        return [SendBlocks(store.peer, Put(call=call, blocks=names), own_pages)]

    def _choose(self, owner: Owner, now_ms: float) -> list[Block]:
        if self._policy == "write-back" and not self._queue:
            low = int(_LOW_WATER * self._pool.ledger.total_pages) // self._pool.pages_per_block
            wanted = self._wanted_free_blocks if now_ms < self._wanted_until_ms else 0
            n_blocks = min(_BATCH_BLOCKS, max(low, wanted) - self._free_blocks)
            return self._pool.withdraw(owner, n_blocks) if n_blocks > 0 else []
        chosen: list[Block] = []
        for name in list(self._queue):
            if len(chosen) == _BATCH_BLOCKS:
                break
            del self._queue[name]
            block = self._pool.cache.get(name)
            if block is not None:
                chosen.append(block)
        if chosen:
            self._pool.pin(owner, [block.name for block in chosen])
        return chosen

    def on_reserved(self, peer: PeerId, message: Reserved, now_ms: float) -> list[Action] | None:
        """The store gave pages for the blocks it lacks; None if the call is not ours."""
        batch = self._batches.get(message.call)
        if batch is None or batch.store.peer != peer:
            return [self._publishing.say(peer, message.call, now_ms, ok=False)] if message.pages else None
        if batch.copying or batch.copied:
            return []  # heard before
        wanted = [place for place, pages in enumerate(message.pages[: len(batch.blocks)]) if pages]
        theirs = page_rows([message.pages[place] for place in wanted], self._pool.pages_per_block)
        if not wanted:
            self._end(message.call)
            return []
        batch.copying, batch.written = True, len(wanted)
        return [StoreBlocks(message.call, batch.store.peer, batch.own_pages[wanted], theirs)]

    def on_moved(self, call: int, moved: Moved, now_ms: float) -> list[Action] | None:
        """The copy of a batch has ended; None if the call is not ours."""
        batch = self._batches.get(call)
        if batch is None:
            return None
        batch.copying, batch.copied = False, True
        batch.until_ms = now_ms + _ANSWER_WITHIN_MS
        self.spilled_bytes_total += moved.n_bytes
        self._pool.release(batch.owner)
        if not moved.ok:
            self.lost_blocks_total += len(batch.blocks)
            del self._batches[call]
        return [self._publishing.say(batch.store.peer, call, now_ms, ok=moved.ok)]

    def on_stored_there(self, peer: PeerId, message: Stored) -> None:
        """The store has answered. Ignored if nothing like it was asked."""
        self._publishing.on_stored(peer, message.call)
        batch = self._batches.get(message.call)
        if batch is None or batch.copying or batch.store.peer != peer:
            return
        if not batch.store.shared:
            self.spilled_bytes_total += len(batch.blocks) * batch.store.block_bytes
        self.spilled_blocks_total += batch.written if batch.store.shared else message.n_blocks
        self._end(message.call)

    def _end(self, call: int) -> None:
        self._pool.release(self._batches.pop(call).owner)

    def on_tick(self, now_ms: float, connected: Callable[[PeerId], bool]) -> list[Action]:
        """Give a batch up that the store does not answer. The copy in progress is the shell's to end."""
        actions: list[Action] = [*self._publishing.on_tick(now_ms, connected)]
        for call, batch in list(self._batches.items()):
            if now_ms >= batch.until_ms and not batch.copying:
                self.lost_blocks_total += len(batch.blocks)
                self._distrusted_until_ms = now_ms + _DISTRUST_MS
                self._end(call)
                if batch.store.shared and not batch.copied:  # else it was said, and is said again
                    actions.append(self._publishing.say(batch.store.peer, call, now_ms, ok=False))
        return actions

    def on_peer_dead(self, peer: PeerId) -> None:
        """The store is gone; a copy into its memory ends by itself."""
        for call, batch in list(self._batches.items()):
            if batch.store.peer == peer and not batch.copying:
                self.lost_blocks_total += len(batch.blocks)
                self._end(call)

    @property
    def n_open(self) -> int:
        """Batches on their way, and last words that are not answered."""
        return len(self._batches) + len(self._publishing)
