"""Maps and unmaps what `ViewSlots` plans: at once for a step, or ahead of it and afterwards in small batches.

Not thread-safe: `SequenceViews` calls it under its lock, and gives the lock up between any two batches.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import OutOfChunks
from kvstore.memory.page_pool import PagePool
from kvstore.memory.view_slots import Change, PageIds, Run, ViewSlots, first_pages

_BATCH_PAGES = 64
"""What is mapped or unmapped while the lock is held: about 3 ms of a GPU's driver, 0.5 ms of Linux."""
_STALE_BLOCKS = 10
"""As many stale blocks are unmapped together (eLLM 2.4)."""
_NEAR_CEILING = 0.8
_NO_SLOT = -1


@dataclass(slots=True)
class Counts:
    """Since the beginning."""

    mapped_calls: int = 0
    unmapped_calls: int = 0
    hit_pages: int = 0
    waited_pages: int = 0
    ahead_pages: int = 0


class ViewMapper:
    """Owns the address range of all slots, and what is to be mapped ahead."""

    def __init__(
        self, pages: PagePool, slots: ViewSlots, n_ranges: int, context_blocks: int, max_mappings: int
    ) -> None:
        """Raises ConfigError if there are no addresses for so many ranges."""
        self._pages, self.slots = pages, slots
        self._page_bytes, self._layers = pages.layout.page_bytes, pages.layout.layers
        self._context_blocks, self._max_mappings = context_blocks, max_mappings
        self._backend = pages.backend
        self.range = self._backend.reserve(n_ranges * context_blocks * self._page_bytes)
        self._queue: dict[Hashable, PageIds] = {}
        self._sweeping = False
        self._refused = False  # the system could not unmap what is stale: tried again after the next `show`
        self.counts = Counts()

    # -- for a step

    def show(self, owner: Hashable, ids: PageIds) -> int | None:
        """Map what is missing. None: no slot or no mappings left. Raises VmMisuse outside of the owner's step."""
        self.slots.fences.require_awaited(owner)
        slots, n_blocks = self.slots, ids.shape[1]
        self._refused = False
        slot, n_new = slots.shows(owner, ids), 0
        if slot is None:
            slot = slots.choose(owner, ids)
            if slot is None:
                return None
            slots.take(slot, owner, n_blocks)
            change = slots.change(slot, ids)
            n_new = change.new_pages
            if not self._make(change):
                return None
        else:
            slots.take(slot, owner, n_blocks)
        self.counts.hit_pages += ids.size - n_new
        self.counts.waited_pages += n_new
        slots.fences.shown(slot, owner, n_blocks)
        return slot

    def _make(self, change: Change) -> bool:
        if not self._make_room(change.slot, change.map):
            return False
        try:
            if not self._unmap(change.unmap):
                return False
            self._map(change.map)
        except OutOfChunks:  # the process has mappings that nobody told us of
            self._unmap(self.slots.stale())
            return False
        return True

    def _make_room(self, slot: int, runs: Iterable[Run], *, idle_only: bool = False) -> bool:
        """Whether these runs can be mapped; ended sequences' mappings go for them, and then others that nobody reads."""
        needed = sum(len(run.pages) + 1 for run in runs)  # on the host a run also divides the hole that it fills
        while (missing := self._backend.live_mappings + needed - self._max_mappings) > 0:
            self.slots.give_up(missing, but=slot, idle_only=idle_only)
            if not self.slots.stale_pages or not self._unmap(self.slots.stale()):
                return False
        return True

    # -- in the background

    def ask(self, owner: Hashable, ids: PageIds) -> None:
        """To be mapped ahead; instead of what was asked for this owner before."""
        if self.slots.shows(owner, ids) is None:
            self._queue[owner] = ids.copy()

    def has_work(self) -> bool:
        """Whether `work_some` has something to do."""
        if self._queue or self._sweeping:
            return True
        stale = self.slots.stale_pages
        near = self._backend.live_mappings > _NEAR_CEILING * self._max_mappings
        self._sweeping = not self._refused and (stale >= _STALE_BLOCKS * self._layers or (near and stale > 0))
        return self._sweeping

    def work_some(self) -> None:
        """One batch: of what is asked for ahead, else of what is stale."""
        if self._queue:
            self._map_some_ahead()
        else:
            batch = first_pages(self.slots.stale(), _BATCH_PAGES)
            self._refused = not self._unmap(batch)
            self._sweeping = self.slots.stale_pages > 0 and not self._refused

    def _map_some_ahead(self) -> None:
        owner, ids = next(iter(self._queue.items()))
        slot = self.slots.choose(owner, ids, idle_only=True)
        if slot is None:
            del self._queue[owner]
            return
        self.slots.take(slot, owner, ids.shape[1])
        change = self.slots.change(slot, ids)
        if change.unmap:
            if not self._unmap(first_pages(change.unmap, _BATCH_PAGES)):
                del self._queue[owner]
            return
        batch = first_pages(change.map, _BATCH_PAGES)
        try:
            roomy = self._make_room(slot, batch, idle_only=True)
            if roomy:
                self._map(batch)
                self.counts.ahead_pages += sum(len(run.pages) for run in batch)
        except OutOfChunks:
            roomy = False
        if not roomy or change.new_pages <= _BATCH_PAGES:
            del self._queue[owner]

    def forget(self, leaving: Callable[[PageIds], NDArray[np.bool_]]) -> None:
        """Unmap all pages of which `leaving` says so, and map none of them ahead.

        Where the system cannot divide a mapping for that, all of slots that nobody reads goes. Raises OutOfChunks if even
        so one of the pages stays mapped.
        """
        if not self._unmap(self.slots.mapped_where(leaving)):
            self.slots.give_up(self.slots.mapped_pages, but=_NO_SLOT)
            self._unmap(self.slots.stale())
            if not self._unmap(self.slots.mapped_where(leaving)):
                raise OutOfChunks("the system bears too few mappings to unmap pages that lose their memory")
        self._queue = {owner: ids for owner, ids in self._queue.items() if not leaving(ids).any()}

    def close(self) -> None:
        """Unmap everything and give the addresses back. The caller guarantees that no step reads."""
        self._queue.clear()
        self.slots.fences.clear()
        self._unmap(self.slots.mapped_where(lambda pages: pages >= 0))
        self._backend.unreserve(self.range)

    # -- calls of the back end

    def _map(self, runs: Iterable[Run]) -> None:
        for run in runs:
            chunks = [self._pages.chunk_of(page) for page in run.pages]
            self._backend.map_run(self.range, self._offset_bytes(run), chunks)
            self.slots.note_mapped(run)
            self.counts.mapped_calls += 1

    def _unmap(self, runs: Iterable[Run]) -> bool:
        """False: of some the system cannot divide the mapping that they lie in; they stay, and are noted as before."""
        all_gone = True
        for run in list(runs):
            try:
                self._backend.unmap_run(self.range, self._offset_bytes(run), len(run.pages))
            except OutOfChunks:
                all_gone = False
                continue
            self.slots.note_unmapped(run)
            self.counts.unmapped_calls += 1
        return all_gone

    def _offset_bytes(self, run: Run) -> int:
        first = (run.slot * self._layers + run.layer) * self._context_blocks
        return (first + run.first_block) * self._page_bytes
