"""Who holds which page of one pool, and in which state. Pure: knows no memory, only page ids."""

from collections.abc import Iterator
from enum import Enum

import numpy as np

from common.errors import OutOfPages
from common.ids import Owner, PageId
from common.messages.liveness import PageCounts


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


class _Holding:
    """Pages of one owner, all in one state, in the order they were allocated."""

    __slots__ = ("pages", "state")

    def __init__(self, state: PageState) -> None:
        self.state = state
        self.pages: list[PageId] = []


class Ledger:
    """The only writer of page states of one pool.

    Law: free + reserved + granted + active + cached + quarantined == total; every page is in exactly one place.
    Pages freed last are allocated first, in rising order, so that one call tends to give neighbours.
    """

    def __init__(self, n_pages: int) -> None:
        self._total_pages = n_pages
        self._free = [PageId(page) for page in range(n_pages - 1, -1, -1)]
        self._held: dict[Owner, _Holding] = {}
        self._pages_in = dict.fromkeys(PageState, 0)
        self._pages_in[PageState.FREE] = n_pages

    @property
    def total_pages(self) -> int:
        """Pages of the pool."""
        return self._total_pages

    @property
    def free_pages(self) -> int:
        """Pages that `alloc` can give."""
        return len(self._free)

    def owners(self, state: PageState | None = None) -> Iterator[Owner]:
        """Everybody who holds pages (in `state`), oldest first."""
        return (owner for owner, holding in self._held.items() if state in (None, holding.state))

    def state_of(self, owner: Owner) -> PageState | None:
        """State of an owner's pages; None if it is unknown."""
        holding = self._held.get(owner)
        return None if holding is None else holding.state

    def pages_of(self, owner: Owner) -> list[PageId]:
        """A copy of the owner's pages, in the order they were allocated. Raises LedgerMisuse if unknown."""
        return list(self._holding(owner).pages)

    def alloc(self, owner: Owner, n_pages: int, state: PageState) -> list[PageId]:
        """Give `n_pages` (0 is allowed) to `owner`, new or in the same state; all of them or OutOfPages."""
        if n_pages < 0 or state is PageState.FREE:
            raise LedgerMisuse(f"cannot allocate {n_pages} pages as {state.value}")
        holding = self._held.get(owner)
        if holding is not None and holding.state is not state:
            raise LedgerMisuse(f"{owner!r} holds {holding.state.value} pages and cannot take {state.value} ones")
        if n_pages > len(self._free):
            raise OutOfPages(f"{n_pages} pages asked for, {len(self._free)} of {self._total_pages} are free")
        if holding is None:
            holding = self._held[owner] = _Holding(state)
        first = len(self._free) - n_pages
        taken = self._free[first:]
        del self._free[first:]
        taken.reverse()
        holding.pages += taken
        self._count(PageState.FREE, state, n_pages)
        return taken

    def move(self, owner: Owner, state: PageState) -> None:
        """Change the state of all the owner's pages. FREE is not a state to move to: use `free`."""
        holding = self._holding(owner)
        if state is PageState.FREE:
            raise LedgerMisuse(f"pages of {owner!r} become free by free(), not by move()")
        self._count(holding.state, state, len(holding.pages))
        holding.state = state

    def rename(self, owner: Owner, new_owner: Owner) -> None:
        """Hand all pages over, as when a granted transfer becomes a running request. Raises if the name is taken."""
        holding = self._holding(owner)
        if new_owner in self._held:
            raise LedgerMisuse(f"{new_owner!r} holds pages already; {owner!r} cannot take its name")
        del self._held[owner]
        self._held[new_owner] = holding

    def free(self, owner: Owner) -> int:
        """Free all pages of an owner and forget it; returns how many. Raises LedgerMisuse if unknown or freed before."""
        holding = self._holding(owner)
        del self._held[owner]
        holding.pages.reverse()
        self._free += holding.pages
        self._count(holding.state, PageState.FREE, len(holding.pages))
        return len(holding.pages)

    def counts(self) -> PageCounts:
        """Pages by state, for reports."""
        by_name = {state.value: count for state, count in self._pages_in.items()}
        return PageCounts(total=self._total_pages, **by_name)

    def check(self) -> None:
        """Raise LedgerMisuse with the full table if a page is lost, held twice, or miscounted. O(pages)."""
        seen = dict.fromkeys(PageState, 0)
        seen[PageState.FREE] = len(self._free)
        for holding in self._held.values():
            seen[holding.state] += len(holding.pages)
        every = np.fromiter(self._every_page(), dtype=np.int64)
        in_range = bool(np.all((every >= 0) & (every < self._total_pages)))
        each_once = in_range and bool(np.all(np.bincount(every, minlength=self._total_pages) == 1))
        if seen != self._pages_in or not each_once:
            raise LedgerMisuse(f"pages do not add up: {self._table(seen)}")

    def _every_page(self) -> Iterator[int]:
        yield from self._free
        for holding in self._held.values():
            yield from holding.pages

    def _table(self, seen: dict[PageState, int]) -> str:
        counted = {state.value: (self._pages_in[state], seen[state]) for state in PageState}
        held = {owner: (holding.state.value, holding.pages) for owner, holding in self._held.items()}
        return f"total {self._total_pages}; state (counted, seen) {counted}; free {self._free}; held {held}"

    def _count(self, source: PageState, target: PageState, n_pages: int) -> None:
        self._pages_in[source] -= n_pages
        self._pages_in[target] += n_pages

    def _holding(self, owner: Owner) -> _Holding:
        try:
            return self._held[owner]
        except KeyError:
            raise LedgerMisuse(f"{owner!r} holds no pages: never allocated, or freed before") from None
