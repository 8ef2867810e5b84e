"""Who holds which page of one pool, and in which state. Pure: knows no memory, only page ids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from common.errors import OutOfPages
from common.ids import Owner, PageId
from common.messages.liveness import PageCounts

PageIds = NDArray[np.int32]
_NOBODY = -1
_FREE = -2
_GONE = -3
_SPARE_ENTRIES = 1024


class LedgerMisuse(RuntimeError):
    """Freed twice, unknown owner, or a broken conservation law. Our own bug: it must end the process."""


class PageState(Enum):
    """What a page is doing. FREE pages have no owner; all others have exactly one."""

    FREE = "free"
    RESERVED = "reserved"
    GRANTED = "granted"
    ACTIVE = "active"
    CACHED = "cached"
    QUARANTINED = "quarantined"
    LENT = "lent"


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """Of each page of a run, one truth each; pages that are none of these have another owner."""

    free: NDArray[np.bool_]
    lent: NDArray[np.bool_]
    gone: NDArray[np.bool_]
    """No pages of the pool: they make no whole block, or left."""


class _Holding:
    """Pages of one owner, all in one state. `runs` may list pages given away since; `Ledger._owner_of` decides."""

    __slots__ = ("n_listed", "n_pages", "number", "runs", "state")

    def __init__(self, number: int, state: PageState) -> None:
        self.number, self.state = number, state
        self.runs: list[PageIds] = []
        self.n_pages = self.n_listed = 0

    def pages(self, owner_of: NDArray[np.int64], scratch: NDArray[np.int64]) -> PageIds:
        """What its runs list and is still its own. `scratch`: a number for each page, for use."""
        listed = np.concatenate(self.runs) if self.runs else np.empty(0, np.int32)
        if listed.size == self.n_pages:
            return listed
        mine: PageIds = listed[owner_of[listed] == self.number]
        if mine.size == self.n_pages:
            return mine
        at = np.arange(mine.size)
        scratch[mine] = at  # a page that left and came back is listed twice: its last place counts
        once: PageIds = mine[scratch[mine] == at]
        return once


class Ledger:
    """The only writer of page states of one pool.

    Law: free + reserved + granted + active + cached + quarantined + lent == total + overhang; every page is in exactly
    one place. The overhang is of pages from `total` on, which are gone as soon as their owners free them: `resize` leaves it.
    Pages freed last are allocated first, in rising order, so that one call tends to give neighbours.
    """

    def __init__(self, n_pages: int) -> None:
        self._total_pages = n_pages
        self._free: PageIds = np.arange(n_pages - 1, -1, -1, dtype=np.int32)  # a stack: `_n_free` entries count
        self._n_free = n_pages
        self._owner_of = np.full(n_pages, _FREE, np.int64)
        self._scratch = np.zeros(n_pages, np.int64)
        self._held: dict[Owner, _Holding] = {}
        self._numbers = 0
        self._pages_in = dict.fromkeys(PageState, 0)
        self._pages_in[PageState.FREE] = n_pages
        self.overhang_pages = 0
        """Pages from `total_pages` on that somebody holds still."""
        self.freed_pages_total = 0
        """Pages that became free or left, since the start."""

    @property
    def total_pages(self) -> int:
        """Pages of the pool, without the overhang."""
        return self._total_pages

    @property
    def kept_pages(self) -> int:
        """Pages 0 to this - 1 must keep their memory: `total_pages`, or more while there is an overhang."""
        if not self.overhang_pages:
            return self._total_pages
        return self._total_pages + int(np.flatnonzero(self._owner_of[self._total_pages :] != _GONE)[-1]) + 1

    @property
    def free_pages(self) -> int:
        """Pages that `alloc` can give."""
        return self._n_free

    def owners(self, state: PageState | None = None) -> Iterator[Owner]:
        """Everybody who holds pages (in `state`), oldest first."""
        return (owner for owner, holding in self._held.items() if state in (None, holding.state))

    def state_of(self, owner: Owner) -> PageState | None:
        """State of an owner's pages; None if it is unknown."""
        return self._held[owner].state if owner in self._held else None

    def pages_of(self, owner: Owner) -> list[PageId]:
        """A copy of the owner's pages, in the order it came by them. Raises LedgerMisuse if unknown."""
        return [PageId(page) for page in self._pages(self._holding(owner)).tolist()]

    def page_ids(self, owner: Owner) -> PageIds:
        """As `pages_of`, for many pages. Empty if the owner is unknown."""
        holding = self._held.get(owner)
        return np.empty(0, np.int32) if holding is None else self._pages(holding).copy()

    def alloc(self, owner: Owner, n_pages: int, state: PageState) -> PageIds:
        """Give `n_pages` (0 is allowed) to `owner`, new or in the same state; all of them or OutOfPages."""
        if n_pages < 0 or state is PageState.FREE:
            raise LedgerMisuse(f"cannot allocate {n_pages} pages as {state.value}")
        holding = self._joinable(owner, state)
        if n_pages > self._n_free:
            raise OutOfPages(f"{n_pages} pages asked for, {self._n_free} of {self._total_pages} are free")
        taken = self._free[self._n_free - n_pages : self._n_free][::-1].copy()
        self._n_free -= n_pages
        self._put(owner, holding, taken, state)
        self._count(PageState.FREE, state, n_pages)
        return taken.copy()

    def claim(self, owner: Owner, pages: PageIds, state: PageState) -> None:
        """Give `owner`, new or in the same state, these very pages, all free: else LedgerMisuse. O(free pages)."""
        holding, claimed = self._joinable(owner, state), np.array(pages, np.int32)
        if state is PageState.FREE or not self._are_of(_FREE, claimed):
            raise LedgerMisuse(f"pages {claimed.tolist()} are not all free, each named once")
        self._put(owner, holding, claimed, state)
        free = self._free[: self._n_free]
        kept = free[self._owner_of[free] == _FREE]
        self._free[: kept.size], self._n_free = kept, kept.size
        self._count(PageState.FREE, state, claimed.size)

    def standing(self, end: int) -> Standing:
        """Of pages 0 to end - 1: who is free, lent or beyond the last page."""
        of, lent = self._owner_of[:end], [one.number for one in self._held.values() if one.state is PageState.LENT]
        return Standing(of == _FREE, np.isin(of, lent), of == _GONE)

    def move(self, owner: Owner, state: PageState) -> None:
        """Change the state of all the owner's pages. FREE is not a state to move to: use `free`."""
        holding = self._holding(owner)
        if state is PageState.FREE:
            raise LedgerMisuse(f"pages of {owner!r} become free by free(), not by move()")
        self._count(holding.state, state, holding.n_pages)
        holding.state = state

    def rename(self, owner: Owner, new_owner: Owner) -> None:
        """Hand all pages over, as when a granted transfer becomes a running request. Raises if the name is taken."""
        holding = self._holding(owner)
        if new_owner in self._held:
            raise LedgerMisuse(f"{new_owner!r} holds pages already; {owner!r} cannot take its name")
        del self._held[owner]
        self._held[new_owner] = holding

    def give(self, owner: Owner, pages: Sequence[PageId] | PageIds, new_owner: Owner, state: PageState) -> None:
        """Hand some of an owner's pages to another, new or in `state` already. Raises LedgerMisuse, nothing changed."""
        holding, target = self._holding(owner), self._joinable(new_owner, state)
        if state is PageState.FREE:
            raise LedgerMisuse(f"pages of {owner!r} become free by free_some(), not by give()")
        given = np.array(pages, np.int32)
        self._take(owner, holding, given)
        self._put(new_owner, target, given, state)
        self._count(holding.state, state, given.size)

    def free(self, owner: Owner) -> int:
        """Free all pages of an owner and forget it; returns how many. Raises LedgerMisuse if unknown or freed before."""
        holding = self._holding(owner)
        self._push(self._pages(holding))
        del self._held[owner]
        self._count(holding.state, PageState.FREE, holding.n_pages)
        return holding.n_pages

    def free_some(self, owner: Owner, pages: Sequence[PageId] | PageIds) -> None:
        """Free some of an owner's pages. Raises LedgerMisuse, with nothing changed, if they are not its own."""
        holding, freed = self._holding(owner), np.array(pages, np.int32)
        self._take(owner, holding, freed)
        self._push(freed)
        self._count(holding.state, PageState.FREE, freed.size)

    def resize(self, n_pages: int) -> int:
        """Have pages 0 to n_pages - 1; returns how many must keep their memory: more, while there is an overhang.

        Nobody loses a page: those from `n_pages` on that are free are gone at once, the others when they are freed. New
        pages are free, and given after all that are free already.
        """
        if n_pages < 0:
            raise LedgerMisuse(f"a pool of {n_pages} pages")
        self._extend(n_pages)
        free = self._free[: self._n_free]
        leaving = free[free >= n_pages]
        self._owner_of[leaving] = _GONE
        first_new = min(self._total_pages, n_pages)
        new = first_new + np.flatnonzero(self._owner_of[first_new:n_pages] == _GONE).astype(np.int32)
        self._owner_of[new] = _FREE
        kept = np.concatenate([new[::-1], free[free < n_pages]])
        self._free[: kept.size], self._n_free = kept, kept.size
        self._pages_in[PageState.FREE] = kept.size
        self.freed_pages_total += new.size + leaving.size
        self._total_pages = n_pages
        self.overhang_pages = int(np.count_nonzero(self._owner_of[n_pages:] != _GONE))
        return self.kept_pages

    def _extend(self, n_pages: int) -> None:
        """Room for pages up to `n_pages`. It never goes back: a holding may list pages that left."""
        more = n_pages - self._owner_of.size
        if more > 0:
            self._owner_of = np.concatenate([self._owner_of, np.full(more, _GONE, np.int64)])
            self._scratch = np.concatenate([self._scratch, np.zeros(more, np.int64)])
            self._free = np.concatenate([self._free, np.zeros(more, np.int32)])

    def counts(self) -> PageCounts:
        """Pages by state, for reports; `total` is their sum."""
        total = self._total_pages + self.overhang_pages
        return PageCounts(total=total, **{state.value: count for state, count in self._pages_in.items()})

    def check(self) -> None:
        """Raise LedgerMisuse with the full table if a page is lost, held twice, or miscounted. O(pages)."""
        seen = {**dict.fromkeys(PageState, 0), PageState.FREE: self._n_free}
        whole = True
        for holding in self._held.values():
            listed = self._pages(holding)
            seen[holding.state] += listed.size
            whole &= np.unique(listed).size == listed.size == holding.n_pages
            whole &= bool(np.all(self._owner_of[listed] == holding.number))
        free = self._free[: self._n_free]
        whole &= np.unique(free).size == free.size
        whole &= bool(np.all(self._owner_of[free] == _FREE) and np.all(free < self._total_pages))
        whole &= np.count_nonzero(self._owner_of[self._total_pages :] != _GONE) == self.overhang_pages
        if seen != self._pages_in or not whole or sum(seen.values()) != self._total_pages + self.overhang_pages:
            raise LedgerMisuse(f"pages do not add up: {self._table(seen)}")

    def _joinable(self, owner: Owner, state: PageState) -> _Holding:
        """The owner's holding if it is in `state`; a new one, not yet listed, if it has none."""
        holding = self._held.get(owner)
        if holding is None:
            self._numbers += 1
            return _Holding(self._numbers, state)
        if holding.state is not state:
            raise LedgerMisuse(f"{owner!r} holds {holding.state.value} pages and cannot take {state.value} ones")
        return holding

    def _put(self, owner: Owner, holding: _Holding, pages: PageIds, state: PageState) -> None:
        self._held[owner] = holding
        self._owner_of[pages] = holding.number
        holding.runs.append(pages)
        holding.n_pages += pages.size
        holding.n_listed += pages.size

    def _take(self, owner: Owner, holding: _Holding, pages: PageIds) -> None:
        if not self._are_of(holding.number, pages):
            raise LedgerMisuse(f"{owner!r} does not hold each of pages {pages.tolist()} once")
        self._owner_of[pages] = _NOBODY
        holding.n_pages -= pages.size
        if holding.n_pages == 0:
            holding.runs, holding.n_listed = [], 0
        elif holding.n_listed > 2 * holding.n_pages + _SPARE_ENTRIES:
            holding.runs, holding.n_listed = [self._pages(holding)], holding.n_pages

    def _are_of(self, number: int, pages: PageIds) -> bool:
        if pages.size and not (int(pages.min()) >= 0 and int(pages.max()) < self._owner_of.size):
            return False
        at = np.arange(pages.size)
        self._scratch[pages] = at  # a page that is named twice keeps only its last place
        return bool(np.all(self._owner_of[pages] == number) and np.all(self._scratch[pages] == at))

    def _pages(self, holding: _Holding) -> PageIds:
        return holding.pages(self._owner_of, self._scratch)

    def _push(self, pages: PageIds) -> None:
        self.freed_pages_total += pages.size
        if self.overhang_pages:
            leaving = pages >= self._total_pages
            self._owner_of[pages[leaving]] = _GONE
            n_gone = int(np.count_nonzero(leaving))
            self.overhang_pages -= n_gone
            self._pages_in[PageState.FREE] -= n_gone  # the caller counts them as freed
            pages = pages[~leaving]
        self._owner_of[pages] = _FREE
        self._free[self._n_free : self._n_free + pages.size] = pages[::-1]
        self._n_free += pages.size

    def _table(self, seen: dict[PageState, int]) -> str:
        counted = {state.value: (self._pages_in[state], seen[state]) for state in PageState}
        held = {owner: (holding.state.value, self._pages(holding).tolist()) for owner, holding in self._held.items()}
        free, total = self._free[: self._n_free].tolist(), f"{self._total_pages} + {self.overhang_pages}"
        return f"total {total}; state (counted, seen) {counted}; free {free}; held {held}"

    def _count(self, source: PageState, target: PageState, n_pages: int) -> None:
        self._pages_in[source] -= n_pages
        self._pages_in[target] += n_pages

    def _holding(self, owner: Owner) -> _Holding:
        try:
            return self._held[owner]
        except KeyError:
            raise LedgerMisuse(f"{owner!r} holds no pages: never allocated, or freed before") from None
