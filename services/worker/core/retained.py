"""Layers that stayed on the device when the others left, while their sequence waits for room for these. Pure.

They are in the host buffer too, so they can go at any moment; a sequence that begins again has the fewer to fetch.
"""

from dataclasses import dataclass

import numpy as np

from common.ids import Owner
from kvstore.index.ledger import PageIds, PageState
from services.worker.core.found import Load
from services.worker.core.prefix import PrefixReuse
from services.worker.core.sequence import Sequence


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What one sequence has on the device."""

    leaving: tuple[int, ...]
    """Layers that it lacks."""
    staying: tuple[int, ...]
    pages: PageIds
    """[blocks, staying layers], of the blocks that are in the buffer."""
    first_block: int
    """Before it all was cached, and is pinned."""


class RetainedLayers:
    """Owns them, from the end of their sequence's first step until it begins again, is over, or somebody needs the room."""

    def __init__(self, reuse: PrefixReuse) -> None:
        self._reuse, self._pool = reuse, reuse.pool
        self._layers = reuse.pool.pages_per_block
        self._kept: dict[int, Kept] = {}
        self._absent: dict[int, tuple[int, ...]] = {}  # between a return's beginning and its load's

    def keep(self, call: int, kept: Kept) -> None:
        """The pages, and pins, of `kept_owner(call)`; the sequence will be found by this call."""
        if self._pool.holds(kept_owner(call)):
            self._kept[call] = kept

    def missing_blocks(self, sequence: Sequence, n_blocks: int) -> int:
        """Blocks that it must take to begin again, of the `n_blocks` that it would without retained layers."""
        kept = self._of(sequence)
        return n_blocks if kept is None else n_blocks - kept.pages.size // self._layers

    def begin(self, sequence: Sequence) -> Load | None:
        """As `PrefixReuse.begin`, with the layers that it has."""
        kept = self._of(sequence)
        if kept is None or sequence.found is None:
            return self._reuse.begin(sequence)
        call = sequence.found.call
        del self._kept[call]

        def new_pages(n_blocks: int) -> PageIds:
            self._pool.give(kept_owner(call), kept.pages, sequence.owner, PageState.RESERVED)
            self._pool.release(kept_owner(call))
            n_pages = n_blocks * self._layers - kept.pages.size
            fresh = self._pool.alloc(sequence.owner, -(-n_pages // self._layers), PageState.RESERVED).reshape(-1)
            pages = np.full((n_blocks, self._layers), -1, np.int32)
            pages[: len(kept.pages), list(kept.staying)] = kept.pages
            pages[pages < 0] = fresh[:n_pages]
            return pages

        if self._reuse.hits(sequence) != kept.first_block or not kept.staying:
            self._pool.release(kept_owner(call))
            return self._reuse.begin(sequence)
        self._absent[call] = kept.leaving
        return self._reuse.begin(sequence, new_pages)

    def take_absent(self, call: int) -> tuple[int, ...]:
        """Layers that a load must fetch; none named: all."""
        return self._absent.pop(call, ())

    def _of(self, sequence: Sequence) -> Kept | None:
        return None if sequence.found is None else self._kept.get(sequence.found.call)

    @property
    def kept_blocks(self) -> int:
        """Blocks that `let_go` can free, at the most: others may have pinned some of them too."""
        owners = [kept_owner(call) for call in self._kept]
        pinned = {name for owner in owners for name in self._pool.pins_of(owner)}
        return len(pinned) + sum(len(self._pool.pages_of(owner)) for owner in owners) // self._layers

    def let_go(self) -> bool:
        """Free the retained layers of the last that came. False if there are none."""
        if not self._kept:
            return False
        call, _ = self._kept.popitem()
        self._pool.release(kept_owner(call))
        return True

    def forget(self, sequence: Sequence) -> None:
        """The sequence is over."""
        if self._of(sequence) is not None and sequence.found is not None:
            del self._kept[sequence.found.call]
            self._pool.release(kept_owner(sequence.found.call))


def kept_owner(call: int) -> Owner:
    """Who owns the retained layers, and the pins, while the sequence has no pages."""
    return Owner(f"retained/{call}")
