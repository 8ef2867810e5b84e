"""Finished blocks of one medium, by hash: what is here, where, who uses it, and what goes next. Pure.

A hash names a block and everything before it, so the prefix index is a hash map: a match walks the hashes of a prompt
until one is missing. It costs one lookup per block of the prompt, however many blocks are cached (docs/benchmarks).
"""

import heapq
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from common.block_hash import BlockHash
from common.policy.eviction import EvictionPolicy
from kvstore.index.ledger import LedgerMisuse

Place = TypeVar("Place")
_SPARE_ENTRIES = 64


class CachedBlock(Generic[Place]):
    """One block. Everybody but the BlockCache only reads it."""

    __slots__ = ("depth", "name", "parent", "pins", "place", "queued", "score", "use")

    def __init__(self, name: BlockHash, parent: BlockHash, depth: int, place: Place) -> None:
        self.name, self.parent, self.depth, self.place = name, parent, depth, place
        self.pins = 0
        self.score, self.use = 0.0, 0
        self.queued = False


class BlockCache(Generic[Place]):
    """Owns `_blocks`; a block comes with `insert` and leaves with `evict` or `remove`, never while it is pinned.

    Victims are leaves (blocks without a cached child) as long as there are any. Law: evictable == blocks - pinned.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._blocks: dict[BlockHash, CachedBlock[Place]] = {}
        self._children: dict[BlockHash, int] = {}  # cached children, also of blocks that are not here
        self._queue: list[tuple[float, int, BlockHash]] = []  # evictable leaves by score as of when they were queued
        self._uses = 0
        self._floor = 0.0
        self.n_pinned = 0
        """Blocks with at least one pin."""
        self.loosened_total = 0
        """How often a block came to be without pins, since the start."""

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, name: BlockHash) -> bool:
        return name in self._blocks

    def __iter__(self) -> Iterator[CachedBlock[Place]]:
        return iter(self._blocks.values())

    @property
    def n_evictable(self) -> int:
        """Blocks that `evict` can give."""
        return len(self._blocks) - self.n_pinned

    def run(self, names: Sequence[BlockHash], start: int = 0) -> int:
        """How many of `names`, from `start` on, are here without a gap. Not a use."""
        blocks, at = self._blocks, start
        while at < len(names) and names[at] in blocks:
            at += 1
        return at - start

    def has_child(self, name: BlockHash) -> bool:
        """Whether a block that comes right after `name` is here."""
        return name in self._children

    def get(self, name: BlockHash) -> CachedBlock[Place] | None:
        """The block, or None."""
        return self._blocks.get(name)

    def insert(
        self, names: Sequence[BlockHash], places: Sequence[Place], *, parent: BlockHash, depth: int, pins: int = 0
    ) -> list[int]:
        """Make a run of finished blocks of one chain visible; returns the positions of those that were not here yet.

        `parent` comes before the first, which has `depth` blocks before it. New blocks get `pins` pins; a block that is
        here already keeps its place. All of them count as used.
        """
        blocks, children, new = self._blocks, self._children, list[int]()
        score, floor, use = self._policy.score, self._floor, self._uses + len(names)
        self._uses = use
        for position, (name, place) in enumerate(zip(names, places, strict=True)):
            block = blocks.get(name)
            if block is None:
                block = blocks[name] = CachedBlock(name, parent, depth + position, place)
                block.pins = pins
                children[parent] = children.get(parent, 0) + 1
                new.append(position)
            block.use = use  # as `use` numbers them: the last counts first
            block.score = score(use, floor, block.depth)
            use -= 1
            parent = name
        if pins:
            self.n_pinned += len(new)
        else:
            self.loosened_total += len(new)
            for position in new:
                if names[position] not in children:
                    self._queue_if_leaf(blocks[names[position]])
        return new

    def use(self, names: Sequence[BlockHash]) -> None:
        """These blocks were of use. The last counts first, so that of a chain the end is the older part."""
        blocks, score, floor, count = self._blocks, self._policy.score, self._floor, self._uses
        for name in reversed(names):
            block = blocks[name]
            count += 1
            block.use = count
            block.score = score(count, floor, block.depth)
        self._uses = count

    def pin(self, names: Sequence[BlockHash]) -> None:
        """Keep these blocks until as many `unpin`s. Raises KeyError if one is not here."""
        for name in names:
            block = self._blocks[name]
            self.n_pinned += block.pins == 0
            block.pins += 1

    def unpin(self, names: Sequence[BlockHash]) -> None:
        """Undo one pin of each. Raises LedgerMisuse for a block that is not pinned."""
        for name in reversed(names):
            block = self._blocks.get(name)
            if block is None or block.pins == 0:
                raise LedgerMisuse(f"block {name.hex()} is not pinned")
            block.pins -= 1
            if block.pins == 0:
                self.n_pinned -= 1
                self.loosened_total += 1
                self._queue_if_leaf(block)

    def evict(self, n_blocks: int) -> list[CachedBlock[Place]]:
        """Take out up to `n_blocks`, lowest score first; fewer only if all others are pinned."""
        victims: list[CachedBlock[Place]] = []
        while len(victims) < n_blocks and (leaf := self._next_leaf()) is not None:
            self._take_out(leaf, victims)
        if (
            len(victims) < n_blocks and self.n_evictable
        ):  # what is left has pinned descendants: rare, so a search will do
            unpinned = (block for block in self._blocks.values() if not block.pins)
            rest = heapq.nsmallest(n_blocks - len(victims), unpinned, key=lambda block: (block.score, block.use))
            for block in rest:
                self._take_out(block, victims)
        return victims

    def _take_out(self, block: CachedBlock[Place], victims: list[CachedBlock[Place]]) -> None:
        self._floor = max(self._floor, block.score)
        self._drop(block)
        victims.append(block)

    def remove(self, name: BlockHash) -> CachedBlock[Place]:
        """Take out one block. Raises KeyError if it is not here, LedgerMisuse if it is pinned."""
        block = self._blocks[name]
        if block.pins:
            raise LedgerMisuse(f"block {name.hex()} has {block.pins} pins and cannot be removed")
        self._drop(block)
        return block

    def check(self) -> None:
        """Raise LedgerMisuse with the numbers if counts disagree or an evictable leaf could never be found."""
        pinned = sum(block.pins > 0 for block in self._blocks.values())
        children: dict[BlockHash, int] = {}
        for block in self._blocks.values():
            children[block.parent] = children.get(block.parent, 0) + 1
        queued = {name for _, _, name in self._queue}
        lost = [
            block.name.hex()
            for block in self._blocks.values()
            if not block.pins and block.name not in children and block.name not in queued
        ]
        if pinned != self.n_pinned or children != self._children or lost:
            raise LedgerMisuse(
                f"block cache: {self.n_pinned} pinned counted, {pinned} seen; child counts agree: "
                f"{children == self._children}; leaves out of the queue: {lost}"
            )

    def _queue_if_leaf(self, block: CachedBlock[Place]) -> None:
        if not block.queued and not block.pins and block.name not in self._children:
            if len(self._queue) > 2 * len(self._blocks) + _SPARE_ENTRIES:  # entries of blocks that were removed since
                self._queue = [(b.score, b.use, b.name) for b in self._blocks.values() if b.queued]
                heapq.heapify(self._queue)
            block.queued = True
            heapq.heappush(self._queue, (block.score, block.use, block.name))

    def _next_leaf(self) -> CachedBlock[Place] | None:
        """The unpinned leaf with the lowest score. Entries that a later use made stale are put back in their place."""
        while self._queue:
            _, use, name = heapq.heappop(self._queue)
            block = self._blocks.get(name)
            if block is None or not block.queued:
                continue
            block.queued = False
            if block.pins or name in self._children:
                continue  # comes back with its last unpin, or when its last child goes
            if block.use == use:
                return block
            self._queue_if_leaf(block)
        return None

    def _drop(self, block: CachedBlock[Place]) -> None:
        del self._blocks[block.name]
        left = self._children[block.parent] - 1
        if left:
            self._children[block.parent] = left
            return
        del self._children[block.parent]
        parent = self._blocks.get(block.parent)
        if parent is not None:
            self._queue_if_leaf(parent)
