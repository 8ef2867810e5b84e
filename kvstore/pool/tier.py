"""One medium of a MemPool: its memory, who holds which block of it, and where the visible ones are."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.block_hash import BlockHash
from common.ids import Owner
from common.kv_layout import KvLayout
from common.policy.eviction import EvictionPolicy
from kvstore.index.block_pool import Block, BlockPool
from kvstore.index.ledger import Ledger, LedgerMisuse, PageIds, PageState
from kvstore.pool.addresses import Address, Medium, WrongAddress
from kvstore.transport.page_sums import page_sums

Bytes = NDArray[np.uint8]


class Before(NamedTuple):
    """What lies before a run of blocks in its chain."""

    name: BlockHash
    """Of the block before, or the root."""
    n_blocks: int


class Tier:
    """Blocks 0 to n_blocks - 1 of one medium; all layers of a block lie together.

    The ledger's unit is the whole block here: nobody holds a part of one. Beside its BlockPool it owns `where` and `names`,
    the visible blocks by name and by number, and `holders`, the private ones; nobody else writes to them.
    """

    def __init__(
        self,
        instance: str,
        medium: Medium,
        layout: KvLayout,
        rows: Bytes,
        policy: EvictionPolicy,
        *,
        keep_sums: bool = False,
    ) -> None:
        """`rows`: [pages, page_bytes] of `medium`. Pages beyond the last whole block stay unused.

        `keep_sums`: make checksums of what becomes visible.
        """
        if (
            rows.dtype != np.uint8
            or rows.ndim != 2
            or rows.shape[1] != layout.page_bytes
            or not rows.flags.c_contiguous
        ):
            raise ValueError(
                f"{medium.value} memory is {rows.dtype} {rows.shape}; it must be contiguous uint8 [pages, {layout.page_bytes}]"
            )
        self.medium, self._instance = medium, instance
        self.n_blocks = rows.shape[0] // layout.layers
        self.memory: Bytes = rows[: self.n_blocks * layout.layers].reshape(
            self.n_blocks, layout.layers * layout.page_bytes
        )
        """[blocks, layers * page_bytes]"""
        self.pool = BlockPool(Ledger(self.n_blocks), 1, policy)
        self.pool.listen(self)
        self.where: dict[BlockHash, Address] = {}
        """Visible blocks; to read."""
        self.names: dict[int, BlockHash] = {}
        """The same by block number; to read."""
        self.holders: dict[int, Owner] = {}
        """Whose each private block is; to read."""
        self._blocks_of: dict[Owner, set[int]] = {}
        self._epochs = [0] * self.n_blocks
        self._page_bytes, self._keep_sums = layout.page_bytes, keep_sums
        self._sums: dict[int, tuple[int, ...]] = {}
        """Of blocks that are or were visible, until they are given out again."""

    # -- what the BlockPool tells

    def on_stored(self, block: Block) -> None:
        """Whoever published it knows the address."""

    def on_used(self, block: Block) -> None:
        """Reading moves nothing."""

    def on_removed(self, block: Block) -> None:
        """A block is not visible any more."""
        del self.names[self.where.pop(block.name).block]

    # -- questions

    def is_current(self, address: Address) -> bool:
        """Whether the block was not given out to anybody else since the address was made."""
        return self._epochs[address.block] == address.epoch

    @property
    def available_blocks(self) -> int:
        """Blocks that `alloc` can give: free ones, and cached ones without pins."""
        return self.pool.available_pages

    def block_at(self, block: Block) -> int:
        """The number of a visible or withdrawn block."""
        return int(block.place[0])

    def holder_of(self, block: int) -> Owner:
        """Whose private block this is. Raises WrongAddress if it is nobody's."""
        try:
            return self.holders[block]
        except KeyError:
            kind = "published" if block in self.names else "free"
            raise WrongAddress(
                f"{self.medium.value} block {block} is {kind}, not one that alloc_mem gave out"
            ) from None

    def sums(self, block: int) -> tuple[int, ...]:
        """Checksums of the pages of a block as they are now, layer by layer."""
        return page_sums(self.memory[block].data, self._page_bytes)

    def kept_sums(self, block: int) -> tuple[int, ...]:
        """As they were when the block became visible; empty if it did not, or none are kept."""
        return self._sums.get(block, ())

    # -- private blocks

    def alloc(self, owner: Owner, n_blocks: int) -> list[Address]:
        """Private blocks for `owner`, whose bytes are undefined. May evict. All or nothing: raises OutOfPages."""
        pages = self.pool.alloc(owner, n_blocks, PageState.ACTIVE)
        blocks: list[int] = pages[:, 0].tolist()
        self._hold(owner, blocks)
        instance, medium, epochs = self._instance, self.medium, self._epochs
        for block in blocks:
            epochs[block] += 1
            self._sums.pop(block, None)
        return [Address(instance, medium, block, epochs[block]) for block in blocks]

    def hand_over(self, blocks: Iterable[int], owner: Owner) -> None:
        """Make private blocks of anybody `owner`'s. The caller checked that they are private."""
        by_holder: dict[Owner, list[int]] = {}
        for block in blocks:
            by_holder.setdefault(self.holders[block], []).append(block)
        for holder, given in by_holder.items():
            self.pool.give(holder, _column(given), owner, PageState.ACTIVE)
            self._hold(owner, given)
            self._take(holder, given)

    def publish(self, owner: Owner, names: Sequence[BlockHash], addresses: Sequence[Address], before: Before) -> None:
        """Make `owner`'s private blocks visible, under names that are not visible here yet.

        `names` is a run of one chain, and `before` is what lies before it.
        """
        blocks = [address.block for address in addresses]
        pages = _column(blocks)
        self.pool.publish(owner, names, pages, parent=before.name, depth=before.n_blocks, pinned=False)
        self.where.update(zip(names, addresses, strict=True))
        self.names.update(zip(blocks, names, strict=True))
        for block in blocks:
            del self.holders[block]
            if self._keep_sums:
                self._sums[block] = self.sums(block)
        self._take(owner, blocks)

    def release(self, owner: Owner) -> int:
        """The owner is over: its pins go and its private blocks are free. Returns how many were private."""
        blocks = self._blocks_of.pop(owner, set())
        for block in blocks:
            del self.holders[block]
        self.pool.release(owner)
        return len(blocks)

    def _hold(self, owner: Owner, blocks: list[int]) -> None:
        self.holders.update(dict.fromkeys(blocks, owner))
        self._blocks_of.setdefault(owner, set()).update(blocks)

    def _take(self, owner: Owner, blocks: list[int]) -> None:
        self._blocks_of[owner].difference_update(blocks)
        if not self._blocks_of[owner] and not self.pool.pins_of(owner):
            self.release(owner)

    # -- visible blocks

    def pin(self, owner: Owner, names: Sequence[BlockHash]) -> None:
        """Keep visible blocks in place until `release`."""
        if names:
            self.pool.pin(owner, names)

    def put_back(self, owner: Owner, victims: Sequence[Block]) -> None:
        """Undo a `withdraw` of the BlockPool: `owner`'s blocks are visible again."""
        for block in victims:
            pages, number = block.place[None], self.block_at(block)
            self.pool.publish(owner, [block.name], pages, parent=block.parent, depth=block.depth, pinned=False)
            self.where[block.name] = Address(self._instance, self.medium, number, self._epochs[number])
            self.names[number] = block.name

    def check(self) -> None:
        """Raise LedgerMisuse with the numbers if a block is lost, counted twice, or not where a map says.

        Between two calls of the MemPool. O(blocks).
        """
        self.pool.check()
        cached = {block.name: self.block_at(block) for block in self.pool.cache}
        mapped = {name: address.block for name, address in self.where.items()}
        if cached != mapped or {name: block for block, name in self.names.items()} != mapped:
            raise LedgerMisuse(f"{self.medium.value}: visible {cached}, the maps say {mapped} and {self.names}")
        owners = self.pool.ledger.owners(PageState.ACTIVE)
        held = {block: owner for owner in owners for block in self.pool.pages_of(owner)}
        listed = {block: owner for owner, blocks in self._blocks_of.items() for block in blocks}
        if not held == listed == self.holders:
            raise LedgerMisuse(f"{self.medium.value}: private {held}, the maps say {self.holders} and {listed}")
        n_free = self.pool.ledger.free_pages
        if len(held) + len(cached) + n_free != self.n_blocks:
            raise LedgerMisuse(
                f"{self.medium.value}: {len(held)} private + {len(cached)} visible + {n_free} free of {self.n_blocks}"
            )


def _column(blocks: Sequence[int]) -> PageIds:
    """Block numbers as the BlockPool wants them, [blocks, 1]."""
    return np.array(blocks, np.int32).reshape(-1, 1)
