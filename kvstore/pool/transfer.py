"""How blocks are copied between tiers. A copy may fail at any block; who calls it gives back what it had allocated."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from kvstore.pool.addresses import Address
from kvstore.pool.tier import Bytes


class BlockCopy(Protocol):
    """Copies whole blocks: target[target_blocks[i]] = source[source_blocks[i]], all [blocks, block_bytes].

    Whatever it raises ends the call that needed the copy; that call's caller gets it.
    """

    def __call__(
        self, target: Bytes, target_blocks: Sequence[int], source: Bytes, source_blocks: Sequence[int]
    ) -> None:
        """Return when all bytes have arrived."""
        ...


def copy_blocks(target: Bytes, target_blocks: Sequence[int], source: Bytes, source_blocks: Sequence[int]) -> None:
    """Plain memory to plain memory, one contiguous run per block: MemServe's aggregated transfer (section 5.3)."""
    for to_block, from_block in zip(target_blocks, source_blocks, strict=True):
        np.copyto(target[to_block], source[from_block])


def runs(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Rising positions as (first, end) of neighbours: [0, 1, 4] -> (0, 2), (4, 5)."""
    if positions and positions[-1] - positions[0] == len(positions) - 1:
        yield positions[0], positions[-1] + 1
        return
    first = 0
    for at in range(1, len(positions) + 1):
        if at == len(positions) or positions[at] != positions[at - 1] + 1:
            yield positions[first], positions[at - 1] + 1
            first = at


def by_media(source: Sequence[Address], target: Sequence[Address]) -> Iterator[tuple[list[Address], list[Address]]]:
    """Pairs of source and target, grouped so that each group has one source medium and one target medium."""
    groups: dict[tuple[str, str], tuple[list[Address], list[Address]]] = {}
    for one, other in zip(source, target, strict=True):
        pair = groups.setdefault((one.medium.value, other.medium.value), ([], []))
        pair[0].append(one)
        pair[1].append(other)
    yield from groups.values()
