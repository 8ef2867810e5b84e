"""How blocks come in: by Reserve and Publish, or whole by Put. Pure.

Pages of a reservation belong to its writer until it publishes or the kernel reports its death. Time alone takes nothing
back, because a writer that is only slow may still be writing; while it is silent its pages count as quarantined.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.block_hash import BlockHash
from common.errors import ProtocolViolation
from common.ids import Owner, PeerId
from common.messages.blocks import BlockName, Publish, Put, Reserve, Reserved, Stored
from kvstore.index.block_pool import BlockPool
from kvstore.index.ledger import PageState
from kvstore.server.core.actions import Action, Pages, Reply, Write
from kvstore.server.core.disk_tier import DiskTier
from kvstore.server.core.names import bad_names
from kvstore.server.core.tally import Tally

_PUT, _ARRANGING = Owner("put"), Owner("arranging")  # both are over before the call that needs them ends


@dataclass(frozen=True, slots=True)
class _Reservation:
    blocks: tuple[BlockName, ...]
    pages: tuple[Pages, ...]
    owner: Owner
    began_ms: float


class Writes:
    """Owns the reservations. One leaves by its Publish, or by `on_peer_dead`."""

    def __init__(self, pool: BlockPool, disk: DiskTier, tally: Tally) -> None:
        self._pool, self._disk, self._tally = pool, disk, tally
        self._reserved: dict[tuple[PeerId, int], _Reservation] = {}

    @property
    def oldest_ms(self) -> float | None:
        """When the oldest reservation began."""
        return min((reserved.began_ms for reserved in self._reserved.values()), default=None)

    def described(self, now_ms: float) -> list[str]:
        """Reservations that stand, for people."""
        return [
            f"{peer} call {call}: {len(one.blocks)} blocks reserved for {now_ms - one.began_ms:.0f} ms"
            for (peer, call), one in self._reserved.items()
        ]

    def reserve(self, peer: PeerId, message: Reserve, now_ms: float) -> Reserved:
        """Pages for the blocks that are not here; a repeated call gets the same. Raises ProtocolViolation."""
        key = (peer, message.call)
        known = self._reserved.get(key)
        if known is not None:
            if known.blocks != message.blocks:
                raise ProtocolViolation(f"{peer} asks for other blocks under its call {message.call}")
            return Reserved(call=message.call, pages=known.pages)
        refusal = bad_names(message.blocks)
        if refusal:
            return Reserved(call=message.call, pages=((),) * len(message.blocks), text=refusal)
        owner = Owner(f"write:{peer}:{message.call}")
        pages = self._allocate(owner, message.blocks)
        if any(pages):
            self._reserved[key] = _Reservation(message.blocks, pages, owner, now_ms)
        elif any(BlockHash(block.name) not in self._pool.cache for block in message.blocks):
            self._tally.add("refused_blocks_total", len(message.blocks))
            return Reserved(call=message.call, pages=pages, text=f"no room: {self._pool.available_pages} pages can go")
        return Reserved(call=message.call, pages=pages)

    def publish(self, peer: PeerId, message: Publish, now_ms: float) -> list[Action]:
        """Make a reservation's blocks visible, or take its pages back. An unknown call changes nothing."""
        reserved = self._reserved.pop((peer, message.call), None)
        if reserved is None:
            return [Reply(peer, Stored(call=message.call, n_blocks=0))]
        actions: list[Action] = []
        if message.ok:
            actions = self._publish(reserved.owner, reserved.blocks, reserved.pages, now_ms)
        self._pool.release(reserved.owner)
        return [*actions, Reply(peer, Stored(call=message.call, n_blocks=self._n_held(reserved.blocks)))]

    def reserved_pages(self, peer: PeerId, call: int) -> tuple[Pages, ...]:
        """What `publish` of this call would make visible, in order; empty for an unknown call."""
        reserved = self._reserved.get((peer, call))
        return () if reserved is None else tuple(pages for pages in reserved.pages if pages)

    def put(self, peer: PeerId, put: Put, frames_bytes: Sequence[int], now_ms: float) -> list[Action]:
        """Take blocks whose bytes came along; all frames have the length of a block."""
        refusal = bad_names(put.blocks)
        if refusal:
            self._tally.add("refused_blocks_total", len(put.blocks))
            return [Reply(peer, Stored(call=put.call, n_blocks=0, text=refusal))]
        pages = self._allocate(_PUT, put.blocks)
        writes: list[Action] = [Write(place, frame) for frame, place in enumerate(pages) if place]
        self._tally.add(
            "kv_received_bytes_total", sum(frames_bytes[frame] for frame, place in enumerate(pages) if place)
        )
        later = self._publish(_PUT, put.blocks, pages, now_ms)
        self._pool.release(_PUT)
        return [*writes, *later, Reply(peer, Stored(call=put.call, n_blocks=self._n_held(put.blocks)))]

    def on_peer_dead(self, peer: PeerId) -> None:
        """It writes no more: what it did not publish is free."""
        for key in [key for key in self._reserved if key[0] == peer]:
            self._pool.release(self._reserved.pop(key).owner)

    def quarantine(self, peer: PeerId) -> None:
        """It is silent, and may still write."""
        for key, reserved in self._reserved.items():
            if key[0] == peer:
                self._pool.move(reserved.owner, PageState.QUARANTINED)

    def _allocate(self, owner: Owner, blocks: Sequence[BlockName]) -> tuple[Pages, ...]:
        """Pages per block, for the leading blocks that are not here and have room; empty for the others.

        No block of the same call has to go for it.
        """
        pool, missing = self._pool, dict[BlockHash, int]()
        here = list(dict.fromkeys(BlockHash(block.name) for block in blocks if BlockHash(block.name) in pool.cache))
        for position, block in enumerate(blocks):
            if BlockHash(block.name) not in pool.cache:
                missing.setdefault(BlockHash(block.name), position)
        pool.take(_ARRANGING, here)
        positions = list(missing.values())[: pool.available_pages // pool.pages_per_block]
        pages: list[Pages] = [()] * len(blocks)
        if positions:
            rows = pool.alloc(owner, len(positions), PageState.RESERVED).tolist()
            for position, row in zip(positions, rows, strict=True):
                pages[position] = tuple(row)
        pool.release(_ARRANGING)
        return tuple(pages)

    def _publish(
        self, owner: Owner, blocks: Sequence[BlockName], pages: Sequence[Pages], now_ms: float
    ) -> list[Action]:
        """Publish what has pages, run by run, and write it behind."""
        written = [position for position, place in enumerate(pages) if place]
        new = 0
        for run in _runs(blocks, written):
            first = blocks[run[0]]
            names = [BlockHash(blocks[position].name) for position in run]
            places = np.array([pages[position] for position in run], np.int32)
            new += self._pool.publish(owner, names, places, parent=BlockHash(first.parent), depth=first.depth)
        self._tally.add("stored_blocks_total", new)
        return self._disk.keep([blocks[position] for position in written], now_ms)

    def _n_held(self, blocks: Sequence[BlockName]) -> int:
        return sum(BlockHash(block.name) in self._pool.cache for block in blocks)


def _runs(blocks: Sequence[BlockName], positions: Sequence[int]) -> list[list[int]]:
    """Positions in stretches that are runs of one chain: the blocks of a call need not be one."""
    runs: list[list[int]] = []
    for position in positions:
        block = blocks[position]
        last = blocks[runs[-1][-1]] if runs else None
        if last is not None and block.parent == last.name and block.depth == last.depth + 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    return runs
