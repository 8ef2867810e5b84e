"""Which block lies in which slot, and which block goes next. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Placement:
    """What a put leads to."""

    held: int
    """How many of the blocks are in the index now."""
    writes: tuple[tuple[int, int], ...]
    """(position in the put, slot): bytes to be written before anybody asks for them."""
    evicted: int


class BlockIndex:
    """Owns the slots 0 to capacity - 1; every slot is free or holds one block.

    The least recently used block is evicted first. The blocks of one call count as used from last to first: a block
    is of use only with all blocks before it, so of a chain the end has to go first.
    """

    def __init__(self, capacity_blocks: int) -> None:
        self._capacity_blocks = capacity_blocks
        self._free = list(range(capacity_blocks - 1, -1, -1))
        self._slots: dict[bytes, int] = {}  # least recently used first

    @property
    def capacity_blocks(self) -> int:
        """Slots in all."""
        return self._capacity_blocks

    @property
    def held_blocks(self) -> int:
        """Slots that hold a block."""
        return len(self._slots)

    def place(self, blocks: Sequence[bytes]) -> Placement:
        """Give every new block a slot. Of more blocks than there are slots, the leading ones are taken.

        Blocks that are here already keep their slot and their bytes. No block of the same call is evicted.
        """
        positions: dict[bytes, int] = {}
        for position, block in enumerate(blocks):
            if len(positions) == self._capacity_blocks:
                break
            positions.setdefault(block, position)
        for block in positions:
            self._touch(block)  # away from the front, where victims are taken
        writes, evicted = [], 0
        for block in reversed(positions):
            if block in self._slots:
                self._touch(block)
                continue
            if not self._free:
                self._free.append(self._slots.pop(next(iter(self._slots))))
                evicted += 1
            self._slots[block] = self._free.pop()
            writes.append((positions[block], self._slots[block]))
        return Placement(sum(block in positions for block in blocks), tuple(sorted(writes)), evicted)

    def leading_run(self, blocks: Sequence[bytes], limit_blocks: int) -> tuple[int, ...]:
        """Slots of the blocks up to the first that is missing, at most `limit_blocks`; they count as used."""
        run = []
        for block in blocks[:limit_blocks]:
            slot = self._slots.get(block)
            if slot is None:
                break
            run.append(slot)
        for block in reversed(blocks[: len(run)]):
            self._touch(block)
        return tuple(run)

    def holds(self, block: bytes) -> bool:
        """True if the block is here; does not count as use."""
        return block in self._slots

    def forget(self, blocks: Sequence[bytes]) -> int:
        """Free the slots of these blocks; returns how many were here."""
        dropped = [self._slots.pop(block) for block in dict.fromkeys(blocks) if block in self._slots]
        self._free += dropped
        return len(dropped)

    def _touch(self, block: bytes) -> None:
        slot = self._slots.pop(block, None)
        if slot is not None:
            self._slots[block] = slot

    def check(self) -> None:
        """Raise AssertionError with the counts if a slot is lost or doubled."""
        slots = sorted([*self._free, *self._slots.values()])
        assert slots == list(range(self._capacity_blocks)), (
            f"{len(self._free)} free + {len(self._slots)} held slots, capacity {self._capacity_blocks}"
        )
