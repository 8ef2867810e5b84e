"""Which sequence is shown in which slot, what must be mapped for it, and what of the rest goes first. Pure.

A slot is one address range per layer, of `context_blocks` blocks each. A page always has the same memory, so a mapping
is right if it is of the right page. When a sequence ends nothing is unmapped: its slot waits for a sequence that begins
with the same pages (vTensor A2, A8; eLLM 2.1). What a slot's new owner finds mapped behind its own blocks is stale and
goes later, in batches (eLLM E8), unless somebody needs the addresses or the mappings before.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvstore.memory.backend import VmMisuse
from kvstore.memory.view_fences import StepFences

PageIds = NDArray[np.int32]
"""[layers, blocks]"""
_EMPTY = -1
_IDLE_STEPS = 4
"""A sequence that no step computed for so long is taken to have ended; one that waits only longer is mapped anew."""


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks of one layer of one slot that lie one behind the other."""

    slot: int
    layer: int
    first_block: int
    pages: tuple[int, ...]
    """What is mapped there, or shall be."""


@dataclass(frozen=True, slots=True)
class Change:
    """What makes a slot show a sequence: `unmap` first, then `map`."""

    slot: int
    unmap: tuple[Run, ...]
    map: tuple[Run, ...]

    @property
    def new_pages(self) -> int:
        """Mappings that it makes."""
        return sum(len(run.pages) for run in self.map)


class ViewSlots:
    """Owns who is shown where, and what is mapped where. Whoever maps and unmaps tells it after each call.

    Law (`check`): pages mapped == pages shown to the slots' owners + stale ones, and no step reads a stale one.
    """

    def __init__(self, n_slots: int, layers: int, context_blocks: int) -> None:
        self._layers, self._context_blocks = layers, context_blocks
        self._pages = np.full((n_slots, layers, context_blocks), _EMPTY, np.int32)
        self._owners: list[Hashable | None] = [None] * n_slots
        self._wanted = [0] * n_slots  # leading blocks that belong to the owner
        self._used = [0] * n_slots  # when, in uses
        self._stepped = [-_IDLE_STEPS] * n_slots  # the last step that computed the owner
        self._mapped = [0] * n_slots
        self._ends = [0] * n_slots  # behind the last block that is mapped, or a later one
        self._stale = [0] * n_slots
        self._slot_of: dict[Hashable, int] = {}
        self._uses = 0
        self.fences = StepFences()

    @property
    def mapped_pages(self) -> int:
        """Mappings of all slots."""
        return sum(self._mapped)

    @property
    def stale_pages(self) -> int:
        """Those of them that no owner has: the zombies."""
        return sum(self._stale)

    def shows(self, owner: Hashable, ids: PageIds) -> int | None:
        """The slot that shows exactly these pages to this owner already."""
        slot = self._slot_of.get(owner)
        if slot is None:
            return None
        there = self._pages[slot, :, : ids.shape[1]]
        return slot if there.shape == ids.shape and (there == ids).all() else None

    def begin(self, owners: Iterable[Hashable]) -> None:
        """A step of these owners begins."""
        computed = list(owners)
        self.fences.begin(computed)
        for owner in computed:
            slot = self._slot_of.get(owner)
            if slot is not None:
                self._stepped[slot] = self.fences.begun

    # -- who gets which slot

    def choose(self, owner: Hashable, ids: PageIds, *, idle_only: bool = False) -> int | None:
        """The best slot for an owner: its own, if what must change there is read by nobody; else the free one with the
        longest run of the same leading pages, then with the fewest others in the way, then the one not used for the
        longest time. None: every slot is read by a step, or, with `idle_only`, has an owner that runs."""
        self._require(ids)
        own = self._slot_of.get(owner)
        if own is not None:
            read = min(self.fences.read_blocks(own), ids.shape[1])
            if np.array_equal(self._pages[own, :, :read], ids[:, :read]):
                return own
        return min(self._candidates(idle_only), key=lambda slot: self._rank(slot, ids), default=None)

    def _candidates(self, idle_only: bool) -> list[int]:
        """Slots whose owners have ended, else the one of those that no step reads that waits for the longest time."""
        unread = [
            slot
            for slot, owner in enumerate(self._owners)
            if not self.fences.read_blocks(slot) and not self.fences.awaits(owner)
        ]
        idle = [slot for slot in unread if self._is_idle(slot)]
        return idle if idle or idle_only else sorted(unread, key=lambda slot: self._used[slot])[:1]

    def _is_idle(self, slot: int) -> bool:
        return self._owners[slot] is None or self.fences.begun - self._stepped[slot] >= _IDLE_STEPS

    def _rank(self, slot: int, ids: PageIds) -> tuple[int, int, int, int]:
        n_blocks = ids.shape[1]
        there = self._pages[slot, :, :n_blocks]
        same = 0
        if n_blocks and there[0, 0] == ids[0, 0]:
            right = (there == ids).all(axis=0)
            same = n_blocks if right.all() else int(right.argmin())
        in_the_way = int(np.count_nonzero(there[:, same:] != _EMPTY)) if self._mapped[slot] else 0
        return -same, in_the_way, self._used[slot], slot

    def take(self, slot: int, owner: Hashable, n_blocks: int) -> None:
        """`slot` is `owner`'s from now on, for at least `n_blocks` blocks. Who had it before has none."""
        before = self._owners[slot]
        if before != owner:
            if before is not None:
                del self._slot_of[before]
            self._let_go(owner)
            self._owners[slot], self._slot_of[owner] = owner, slot
            self._wanted[slot], self._stepped[slot] = 0, self.fences.begun
        if n_blocks > self._wanted[slot]:
            self._wanted[slot] = n_blocks
            self._count_stale(slot)
        self._uses += 1
        self._used[slot] = self._uses

    def _let_go(self, owner: Hashable) -> None:
        old = self._slot_of.pop(owner, None)
        if old is not None:  # a step may still read it: its blocks stay wanted until another takes the slot
            self._owners[old] = None

    def _count_stale(self, slot: int) -> None:
        if self._mapped[slot]:
            self._stale[slot] = int(np.count_nonzero(self._pages[slot, :, self._wanted[slot] :] != _EMPTY))

    # -- what has to be mapped

    def change(self, slot: int, ids: PageIds) -> Change:
        """What makes the slot show these pages. Mappings of other pages that are in the way are unmapped first."""
        there = self._pages[slot, :, : ids.shape[1]]
        wrong = there != ids
        if not wrong.any():
            return Change(slot, (), ())
        unmap = _runs(slot, wrong & (there != _EMPTY), there)
        return Change(slot, tuple(unmap), tuple(_runs(slot, wrong, ids)))

    def note_mapped(self, run: Run) -> None:
        """A run was mapped."""
        end = run.first_block + len(run.pages)
        if end > self._wanted[run.slot]:
            raise VmMisuse(f"{run} is behind the {self._wanted[run.slot]} blocks of its slot's owner")
        self._pages[run.slot, run.layer, run.first_block : end] = run.pages
        self._mapped[run.slot] += len(run.pages)
        self._ends[run.slot] = max(self._ends[run.slot], end)

    def note_unmapped(self, run: Run) -> None:
        """A run was unmapped."""
        end = run.first_block + len(run.pages)
        self._pages[run.slot, run.layer, run.first_block : end] = _EMPTY
        self._mapped[run.slot] -= len(run.pages)
        if end == self._ends[run.slot]:
            filled = np.flatnonzero((self._pages[run.slot, :, :end] != _EMPTY).any(axis=0))
            self._ends[run.slot] = int(filled[-1]) + 1 if filled.size else 0
        self._stale[run.slot] -= max(0, end - max(run.first_block, self._wanted[run.slot]))

    # -- what goes

    def stale(self) -> Iterator[Run]:
        """Every stale mapping. They may be unmapped at any time: no step reads them."""
        for slot, n_pages in enumerate(self._stale):
            if n_pages:
                wanted, there = self._wanted[slot], self._pages[slot]
                yield from _runs(slot, there[:, wanted:] != _EMPTY, there[:, wanted:], first_block=wanted)

    def give_up(self, n_pages: int, *, but: int, idle_only: bool = False) -> None:
        """Make mappings of slots that nobody reads stale until `n_pages` are or none is left: of ended sequences first,
        then, unless `idle_only`, of others; in each case those not used for the longest time. The slot `but` is spared.
        """
        for slot in sorted(self._givable(but), key=lambda slot: (not self._is_idle(slot), self._used[slot])):
            if self.stale_pages >= n_pages or (idle_only and not self._is_idle(slot)):
                return
            owner = self._owners[slot]
            if owner is not None:
                del self._slot_of[owner]
            self._owners[slot], self._wanted[slot] = None, 0
            self._count_stale(slot)

    def _givable(self, but: int) -> list[int]:
        return [
            slot
            for slot, n_pages in enumerate(self._mapped)
            if n_pages and slot != but and not self.fences.read_blocks(slot)
            if not self.fences.awaits(self._owners[slot])
        ]

    def mapped_where(self, leaving: Callable[[PageIds], NDArray[np.bool_]]) -> list[Run]:
        """Every mapping of pages of which `leaving` says so. Raises VmMisuse if a step in flight reads one of them."""
        found: list[Run] = []
        for slot, end in enumerate(self._ends):
            there = self._pages[slot, :, :end]  # the rest, of a long context most of it, would cost milliseconds
            if not end or not (gone := leaving(there) & (there != _EMPTY)).any():
                continue
            if gone[:, : self.fences.read_blocks(slot)].any():
                raise VmMisuse(f"pages lose their memory that a step reads in slot {slot}")
            found += _runs(slot, gone, there)
        return found

    def check(self) -> None:
        """Raise VmMisuse if the counts are not what is mapped, or a step reads a stale mapping or none."""
        for slot, there in enumerate(self._pages):
            wanted, read = self._wanted[slot], self.fences.read_blocks(slot)
            counted = int((there != _EMPTY).sum()), int((there[:, wanted:] != _EMPTY).sum())
            if counted != (self._mapped[slot], self._stale[slot]):
                raise VmMisuse(
                    f"slot {slot}: {counted} mapped and stale, {self._mapped[slot], self._stale[slot]} noted"
                )
            if (there[:, self._ends[slot] :] != _EMPTY).any():
                raise VmMisuse(f"slot {slot}: pages are mapped behind block {self._ends[slot]}")
            if read > wanted or (there[:, :read] == _EMPTY).any():
                raise VmMisuse(f"slot {slot}: a step reads {read} blocks of {wanted}, not all of them mapped")
        owners = {(owner, slot) for slot, owner in enumerate(self._owners) if owner is not None}
        if owners != set(self._slot_of.items()):
            raise VmMisuse(f"slots of {owners}, found under {self._slot_of}")

    def _require(self, ids: PageIds) -> None:
        layers, n_blocks = ids.shape
        if layers != self._layers or n_blocks > self._context_blocks:
            limits = f"{self._layers} layers and at most {self._context_blocks} blocks"
            raise VmMisuse(f"pages of {layers} layers and {n_blocks} blocks; a slot has {limits}")


def first_pages(runs: Iterable[Run], n_pages: int) -> list[Run]:
    """The beginning of the runs, `n_pages` pages of it."""
    found: list[Run] = []
    for run in runs:
        if n_pages <= 0:
            break
        found.append(replace(run, pages=run.pages[:n_pages]))
        n_pages -= len(run.pages)
    return found


def _runs(slot: int, where: NDArray[np.bool_], pages: PageIds, *, first_block: int = 0) -> list[Run]:
    """The places that are set in `where`, in runs within a layer."""
    layers, n_blocks = where.shape
    padded = np.zeros((layers, n_blocks + 2), np.int8)
    padded[:, 1:-1] = where
    steps = np.diff(padded, axis=1)
    begins, ends = np.argwhere(steps == 1), np.argwhere(steps == -1)
    return [
        Run(slot, layer, first_block + begin, tuple(pages[layer, begin:end].tolist()))
        for (layer, begin), end in zip(begins.tolist(), ends[:, 1].tolist(), strict=True)
    ]
