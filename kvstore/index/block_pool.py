"""Blocks of one medium: who holds which pages, and which finished blocks are kept for reuse. Pure.

A block is `pages_per_block` pages, one per layer, that hold the KV of one run of tokens. Its life:

    alloc          pages belong to an owner (a request, a transfer) and nobody else sees them
    publish        the block is complete: its pages belong to the cache, and the owner keeps a pin on it
    take           another owner found it by its hash and pins it too
    release        an owner is over: its pins go, its unpublished pages are free
    evict          a cached block without pins gives its pages up, because somebody allocates
    lend           free pages and those of such blocks leave, a chunk of memory at a time, until taken back

So a block is visible from the moment it is complete and never before, and an owner that fails at any point is undone by
one `release`. Two-phase publish, roll-back and pins are that alone.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from common.block_hash import BlockHash
from common.errors import OutOfPages
from common.ids import Owner
from common.policy.eviction import EvictionPolicy
from kvstore.index.block_cache import BlockCache, CachedBlock
from kvstore.index.ledger import Ledger, LedgerMisuse, PageIds, PageState
from kvstore.index.lent_chunks import LentChunks

CACHE = Owner("cache")
"""Who holds the pages of all cached blocks in the ledger."""
Block = CachedBlock[PageIds]
"""A cached block; `place` is its pages, layer by layer."""


class PoolListener(Protocol):
    """Hears what happens to cached blocks, at once and in order. Must not call the pool back."""

    def on_stored(self, block: Block) -> None:
        """A block became visible."""
        ...

    def on_used(self, block: Block) -> None:
        """A cached block was taken by somebody."""
        ...

    def on_removed(self, block: Block) -> None:
        """A block is not visible any more."""
        ...


class BlockPool:
    """Owns the pins of every owner; pages are the ledger's, visibility is the cache's. Both are used through it alone.

    Laws: the ledger's and the cache's own; every cached block's pages are CACHED; the sum of pins == those owners hold.
    """

    def __init__(self, ledger: Ledger, pages_per_block: int, policy: EvictionPolicy) -> None:
        """Takes over a ledger in which nobody holds pages; pages that make no whole block are left out."""
        ledger.resize(ledger.total_pages - ledger.total_pages % pages_per_block)
        self.ledger = ledger
        """To read: counts and states."""
        self.cache: BlockCache[PageIds] = BlockCache(policy)
        """To read."""
        self._pages_per_block = pages_per_block
        self._pins: dict[Owner, list[BlockHash]] = {}
        self._listeners: list[PoolListener] = []
        self.lent = LentChunks(ledger, self.cache, pages_per_block, self._evict_these)
        """Lends memory, and takes it back."""
        self.evicted_blocks_total = 0

    def listen(self, listener: PoolListener) -> None:
        """Tell `listener` of everything from now on."""
        self._listeners.append(listener)

    # -- room

    @property
    def pages_per_block(self) -> int:
        """Pages of one block: one per layer."""
        return self._pages_per_block

    @property
    def available_pages(self) -> int:
        """Pages that `alloc` can give: free ones and those of cached blocks without pins."""
        return self.ledger.free_pages + self.cache.n_evictable * self._pages_per_block

    def alloc(self, owner: Owner, n_blocks: int, state: PageState) -> PageIds:
        """Pages [n_blocks, pages_per_block] for new blocks: row b holds layer 0, 1, ... of block b.

        Pages of one block are neighbours as long as everybody allocates whole blocks. Evicts cached blocks if it must.
        All or nothing: raises OutOfPages.
        """
        needed = n_blocks * self._pages_per_block
        if needed > self.available_pages:
            raise OutOfPages(
                f"{n_blocks} blocks of {self._pages_per_block} pages asked for; {self.ledger.free_pages} pages are free "
                f"and {self.cache.n_evictable} cached blocks can go"
            )
        missing = needed - self.ledger.free_pages
        if missing > 0:
            self.evict(-(-missing // self._pages_per_block))
        return self.ledger.alloc(owner, needed, state).reshape(n_blocks, self._pages_per_block)

    def evict(self, n_blocks: int) -> int:
        """Free up to `n_blocks` cached blocks, coldest first; returns how many."""
        victims = self.cache.evict(n_blocks)
        if victims:
            self.ledger.free_some(CACHE, _pages_of(victims))
        for block in victims:
            self._tell_removed(block)
        self.evicted_blocks_total += len(victims)
        return len(victims)

    @property
    def usable_pages(self) -> int:
        """Pages that could be had for blocks if nobody held any: all but those lent for good."""
        return self.ledger.total_pages - self.lent.lasting_pages

    def resize(self, n_pages: int) -> int:
        """Have `n_pages` pages, rounded down to whole blocks; returns how many must keep their memory.

        To grow, first give the pages memory. To shrink, take memory only from the pages behind what this returns, and
        once nobody reads there any more: cached blocks beyond the new end are evicted, pages that owners hold stay theirs
        and are gone when these release them. So a second call gets further. Raises LedgerMisuse while chunks are lent.
        """
        if self.lent:
            raise LedgerMisuse(f"{len(self.lent)} chunks are lent: the pool keeps its size until they are back")
        n_pages -= n_pages % self._pages_per_block
        self.ledger.resize(n_pages)
        self._drop_leaving([block.name for block in self.cache])
        return self.ledger.resize(n_pages)

    def _drop_leaving(self, names: Sequence[BlockHash]) -> None:
        """Of these blocks, evict those that nobody pins and whose pages are to go: they would never make room."""
        if self.ledger.overhang_pages:
            end = self.ledger.total_pages
            blocks = (self.cache.get(name) for name in names)
            leaving = [block.name for block in blocks if block is not None and int(block.place.max()) >= end]
            self._evict_these(leaving)

    def _evict_these(self, names: Sequence[BlockHash]) -> None:
        self.evicted_blocks_total += self.forget(names)

    # -- finished blocks

    def match(self, names: Sequence[BlockHash], start: int = 0) -> int:
        """How many of `names`, from `start` on, are cached without a gap. Pins nothing."""
        return self.cache.run(names, start)

    def pinned_run(self, names: Sequence[BlockHash]) -> int:
        """How many of the leading run of `names` that is cached are pinned: taking these costs no available page."""
        run = names[: self.cache.run(names)]
        return sum(self._cached(name).pins > 0 for name in run)

    def take(self, owner: Owner, names: Sequence[BlockHash]) -> PageIds:
        """Pin cached blocks for `owner`; returns their pages [blocks, pages_per_block]. Raises KeyError if one is not here."""
        pages = self.pin(owner, names)
        self.cache.use(names)
        for listener in self._listeners:
            for name in names:
                listener.on_used(self._cached(name))
        return pages

    def pin(self, owner: Owner, names: Sequence[BlockHash]) -> PageIds:
        """As `take`, but not a use: for copying blocks elsewhere."""
        blocks = [self._cached(name) for name in names]
        self.cache.pin(names)
        self._pins.setdefault(owner, []).extend(names)
        return _pages_of(blocks).reshape(-1, self._pages_per_block)

    def publish(
        self,
        owner: Owner,
        names: Sequence[BlockHash],
        pages: PageIds,
        *,
        parent: BlockHash,
        depth: int,
        pinned: bool = True,
    ) -> int:
        """Make complete blocks of `owner` visible; it pins all of `names`, unless not `pinned`. Returns how many were new.

        `names` is a run of one chain: `parent` comes before the first, which has `depth` blocks before it. `pages`
        [blocks, pages_per_block] are the owner's. A block that is cached already stays as it is, and the owner keeps its own pages.
        """
        if pages.shape != (len(names), self._pages_per_block):
            raise LedgerMisuse(f"pages {pages.shape} for {len(names)} blocks of {self._pages_per_block}")
        new = self.cache.insert(names, list(pages.copy()), parent=parent, depth=depth, pins=int(pinned))
        if pinned and len(new) < len(names):  # pins reach back to the root, so that victims can always be leaves
            fresh = set(new)
            known = [name for place, name in enumerate(names) if place not in fresh]
            self.cache.pin(known)
            self._pins.setdefault(owner, []).extend(known)
        if not new:
            return 0
        given = pages if len(new) == len(names) else pages[new]
        self.ledger.give(owner, given.reshape(-1), CACHE, PageState.CACHED)
        published = [names[place] for place in new]
        if pinned:
            self._pins.setdefault(owner, []).extend(published)
        if self._listeners:
            cached = self.cache.get
            blocks = [block for block in map(cached, published) if block is not None]
            for listener in self._listeners:
                for block in blocks:
                    listener.on_stored(block)
        self._drop_leaving(published)
        return len(new)

    def forget(self, names: Sequence[BlockHash]) -> int:
        """Drop cached blocks that nobody has pinned; returns how many went."""
        dropped = 0
        for name in dict.fromkeys(names):
            block = self.cache.get(name)
            if block is None or block.pins:
                continue
            self._tell_removed(self.cache.remove(name))
            self.ledger.free_some(CACHE, block.place)
            dropped += 1
        return dropped

    def withdraw(self, owner: Owner, n_blocks: int) -> list[Block]:
        """Take the coldest unpinned blocks out of sight, but keep their pages: they are `owner`'s, CACHED, from now on.

        For moving them to another medium: copy them there, then `release` the owner.
        """
        victims = self.cache.evict(n_blocks)
        for block in victims:
            self._tell_removed(block)
            self.ledger.give(CACHE, block.place, owner, PageState.CACHED)
        self.evicted_blocks_total += len(victims)
        return victims

    # -- owners

    def move(self, owner: Owner, state: PageState) -> None:
        """Change the state of the owner's own pages. An owner that has only pins has none."""
        if self.ledger.state_of(owner) is not None:
            self.ledger.move(owner, state)

    def give(self, owner: Owner, pages: PageIds, new_owner: Owner, state: PageState) -> None:
        """Hand some of an owner's own pages to another. Raises LedgerMisuse, with nothing changed, if they are not its own."""
        self.ledger.give(owner, pages.reshape(-1), new_owner, state)

    def rename(self, owner: Owner, new_owner: Owner) -> None:
        """Hand over all that an owner holds, pins included. Raises LedgerMisuse if the name is taken."""
        if new_owner in self._pins:
            raise LedgerMisuse(f"{new_owner!r} holds pins already; {owner!r} cannot take its name")
        if self.ledger.state_of(owner) is not None:
            self.ledger.rename(owner, new_owner)
        pins = self._pins.pop(owner, None)
        if pins is not None:
            self._pins[new_owner] = pins

    def release(self, owner: Owner) -> None:
        """The owner is over: unpin what it pinned, free its own pages. An unknown owner is ignored."""
        pins = self._pins.pop(owner, None)
        if pins:
            self.cache.unpin(pins)
            self._drop_leaving(pins)
        if self.ledger.state_of(owner) is not None:
            self.ledger.free(owner)

    def holds(self, owner: Owner) -> bool:
        """Whether the owner has pages or pins."""
        return owner in self._pins or self.ledger.state_of(owner) is not None

    def pages_of(self, owner: Owner) -> list[int]:
        """The owner's own pages, without those it only pinned; empty if it has none."""
        return [] if self.ledger.state_of(owner) is None else list(self.ledger.pages_of(owner))

    def pins_of(self, owner: Owner) -> tuple[BlockHash, ...]:
        """Blocks that the owner has pinned, in the order it pinned them."""
        return tuple(self._pins.get(owner, ()))

    def check(self) -> None:
        """Raise LedgerMisuse with the numbers if a law is broken. O(pages)."""
        self.ledger.check()
        self.lent.check()
        self.cache.check()
        pins = Counter(name for held in self._pins.values() for name in held)
        seen = {block.name: block.pins for block in self.cache if block.pins}
        if pins != seen:
            raise LedgerMisuse(f"pins do not add up: owners hold {_hex(pins)}, the cache counts {_hex(seen)}")
        end, unpinned = self.ledger.total_pages, (block for block in self.cache if not block.pins)
        if stuck := [block.name.hex() for block in unpinned if int(block.place.max()) >= end]:
            raise LedgerMisuse(f"blocks without pins lie behind the last page {end}: {stuck}")
        placed, listed = np.sort(_pages_of(list(self.cache))), np.sort(self.ledger.page_ids(CACHE))
        if not np.array_equal(placed, listed):
            raise LedgerMisuse(f"cached blocks name {placed.size} pages, the ledger lists {listed.size} others")

    def _cached(self, name: BlockHash) -> Block:
        block = self.cache.get(name)
        if block is None:
            raise KeyError(f"block {name.hex()} is not cached")
        return block

    def _tell_removed(self, block: Block) -> None:
        for listener in self._listeners:
            listener.on_removed(block)


def _pages_of(blocks: Sequence[Block]) -> PageIds:
    return np.concatenate([block.place for block in blocks]) if blocks else np.empty(0, np.int32)


def _hex(counts: dict[BlockHash, int]) -> dict[str, int]:
    return {name.hex(): count for name, count in counts.items()}
