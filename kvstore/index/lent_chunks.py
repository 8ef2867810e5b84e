"""Chunks of a pool's memory that serve something else for a while, and which ones cost the cache least. Pure.

A chunk is a run of `chunk_pages` pages whose memory is mapped and unmapped as one; chunk c holds pages c * chunk_pages and
so on. A block of KV may lie across two chunks, so whoever lends a chunk holds all blocks that reach into it.
Source: eLLM (arXiv 2506.15155), ownership of chunks in one pool; the order of victims is ours.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from common.block_hash import BlockHash
from common.errors import OutOfPages
from common.ids import Owner
from kvstore.index.block_cache import BlockCache, CachedBlock
from kvstore.index.ledger import Ledger, LedgerMisuse, PageIds, PageState

_NO_BLOCK = -1


class LentChunks:
    """Owns which chunk is lent to whom; the pages are the ledger's, in state LENT.

    Law: every page of a lent chunk is LENT, and every LENT page lies in a block that reaches into a lent chunk. The first
    chunk is never lent: tables of pages are padded with page 0, which is read and not used.
    """

    def __init__(
        self,
        ledger: Ledger,
        cache: BlockCache[PageIds],
        pages_per_block: int,
        evict: Callable[[Sequence[BlockHash]], None],
    ) -> None:
        """`evict`: takes these blocks, which nobody pins, out of the cache and frees their pages."""
        self._ledger, self._cache, self._pages_per_block, self._evict = ledger, cache, pages_per_block, evict
        self._chunk_pages = 0
        self._owner_of: dict[int, Owner] = {}
        self._none_since: dict[bool, tuple[int, int, int]] = {}  # for `lendable`: all that could change its answer 0
        self._returns = 0
        self.lasting_pages = 0
        """To read: pages lent for good."""

    def __len__(self) -> int:
        return len(self._owner_of)

    @property
    def recallable_pages(self) -> int:
        """Pages that are lent for a while only."""
        return self._ledger.counts().lent - self.lasting_pages

    def of(self, owner: Owner) -> list[int]:
        """Chunks lent to one owner, in the order in which it got them."""
        return [chunk for chunk, other in self._owner_of.items() if other == owner]

    def lendable(self, chunk_pages: int, *, cached: bool = True) -> int:
        """How many chunks `lend` could give now; not `cached`: without evicting any block.

        O(pages), but for the answer 0, which holds until a page or a chunk comes back or a block loses its last pin.
        """
        self._require_length(chunk_pages)
        since = self._ledger.freed_pages_total, self._cache.loosened_total, self._returns
        if self._none_since.get(cached) == since:
            return 0
        n_chunks = int(np.count_nonzero(self._open(self._block_of(self._loose() if cached else ()))))
        if not n_chunks:
            self._none_since[cached] = since
        return n_chunks

    def lend(self, n_chunks: int, chunk_pages: int, to: Owner, *, lasting: bool = False) -> list[int]:
        """Take chunks of memory, runs of `chunk_pages` pages, out of use; returns their numbers, in no order.

        Free ones first, the last first, else those that the fewest and then the coldest cached blocks without pins keep,
        which are evicted; nobody loses a page. All or nothing: raises OutOfPages. `lasting`: for good. O(pages).
        """
        self._require_length(chunk_pages)
        blocks, before = self._loose(), self._ledger.counts().lent
        block_of = self._block_of(blocks)
        chunks = self._choose(n_chunks, blocks, block_of)
        evicted = np.unique(block_of[chunks])
        self._evict([blocks[index].name for index in evicted.tolist() if index != _NO_BLOCK])
        pages = self._around(chunks)
        self._ledger.claim(to, pages[self._ledger.standing(self._end()).free[pages]], PageState.LENT)
        self._owner_of.update(dict.fromkeys(chunks, to))
        if lasting:
            self.lasting_pages += self._ledger.counts().lent - before
        return chunks

    def _choose(self, n_chunks: int, blocks: Sequence[CachedBlock[PageIds]], block_of: NDArray[np.int64]) -> list[int]:
        found = np.flatnonzero(self._open(block_of))
        if found.size < n_chunks:
            raise OutOfPages(
                f"{n_chunks} chunks of {self._chunk_pages} pages asked for; {found.size} are free or only cached"
            )
        uses = np.array([block.use for block in blocks] or [0], np.int64)
        chunk_of, in_way = self._in_the_way(block_of)
        n_blocks = np.bincount(chunk_of, minlength=block_of.shape[0])
        hottest = np.zeros(block_of.shape[0], np.int64)
        np.maximum.at(hottest, chunk_of, uses[in_way])
        lent = self._chunked(self._ledger.standing(self._end()).lent, fill=True)
        held: NDArray[np.bool_] = np.logical_and.reduce(lent, axis=1)
        order = np.lexsort((-found, hottest[found], ~held[found], n_blocks[found]))
        chosen: list[int] = found[order[:n_chunks]].tolist()
        return chosen

    def take_back(self, owner: Owner, chunks: Sequence[int]) -> int:
        """Lent chunks are of use again: free the pages of these chunks, but for blocks that another lent chunk needs; returns how many became free.

        Raises LedgerMisuse, with nothing changed, unless all of them are lent to `owner`, each named once.
        """
        if len(set(chunks)) != len(chunks) or any(self._owner_of.get(chunk) != owner for chunk in chunks):
            raise LedgerMisuse(f"chunks {list(chunks)} are not all lent to {owner!r}, which has {self.of(owner)}")
        leaving, shared_with = self._leaving(owner, chunks)
        self._returns += 1
        for chunk in chunks:
            del self._owner_of[chunk]
        for other, shared in shared_with.items():
            self._ledger.give(owner, shared, other, PageState.LENT)
        self._ledger.free_some(owner, leaving)
        if not self.of(owner) and self._ledger.state_of(owner) is not None:
            self._ledger.free(owner)  # it holds nothing any more, and need not be known
        return leaving.size

    def freed_by(self, owner: Owner, chunks: Sequence[int]) -> int:
        """How many pages `take_back` of these would free. O(pages of the owner)."""
        return self._leaving(owner, chunks)[0].size

    def _leaving(self, owner: Owner, chunks: Sequence[int]) -> tuple[PageIds, dict[Owner, PageIds]]:
        """Of the owner's pages, those that no chunk needs but these; and those that only chunks of others need."""
        gone, shared_with = set(chunks), dict[Owner, PageIds]()
        staying = [chunk for chunk in self.of(owner) if chunk not in gone]
        leaving = np.setdiff1d(self._ledger.page_ids(owner), self._around(staying))
        for other in dict.fromkeys(self._owner_of.values()):
            if other != owner and (shared := np.intersect1d(leaving, self._around(self.of(other)))).size:
                shared_with[other] = shared
                leaving = np.setdiff1d(leaving, shared)
        return leaving, shared_with

    def check(self) -> None:
        """Raise LedgerMisuse if the law is broken. O(pages)."""
        owners = list(self._ledger.owners(PageState.LENT))
        held = np.concatenate([self._ledger.page_ids(owner) for owner in owners] or [np.empty(0, np.int32)])
        lent = list(self._owner_of)
        own = self._pages(lent)
        astray = np.setdiff1d(held, self._around(lent)), np.setdiff1d(own[own < self._ledger.total_pages], held)
        if any(pages.size for pages in astray) or set(self._owner_of.values()) - set(owners):
            raise LedgerMisuse(
                f"lent chunks {self._owner_of} and LENT pages do not agree: too many {astray[0].tolist()}, "
                f"missing {astray[1].tolist()}"
            )

    # -- where chunks and pages lie

    def _loose(self) -> list[CachedBlock[PageIds]]:
        return [block for block in self._cache if not block.pins]

    def _require_length(self, chunk_pages: int) -> None:
        if self._owner_of and chunk_pages != self._chunk_pages:
            raise LedgerMisuse(f"chunks of {self._chunk_pages} pages are lent; they cannot be {chunk_pages} long now")
        if chunk_pages != self._chunk_pages:
            self._none_since.clear()
        self._chunk_pages = chunk_pages

    def _end(self) -> int:
        """Pages up to the end of the last chunk in which there is one of the pool."""
        return -(-self._ledger.total_pages // self._chunk_pages) * self._chunk_pages

    def _chunked(self, by_page: NDArray[np.bool_], *, fill: bool) -> NDArray[np.bool_]:
        """[chunks, chunk_pages]; pages behind all that there ever were get `fill`."""
        whole = np.full(self._end(), fill)
        whole[: by_page.size] = by_page
        return whole.reshape(-1, self._chunk_pages)

    def _block_of(self, blocks: Sequence[CachedBlock[PageIds]]) -> NDArray[np.int64]:
        """[chunks, chunk_pages]: the place in `blocks` of the one that holds the page."""
        block_of = np.full(self._end(), _NO_BLOCK, np.int64)
        if blocks:
            pages = np.concatenate([block.place for block in blocks])
            index = np.repeat(np.arange(len(blocks)), self._pages_per_block)
            here = pages < block_of.size
            block_of[pages[here]] = index[here]
        return block_of.reshape(-1, self._chunk_pages)

    def _open(self, block_of: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which chunks can be lent: each of their pages is free, goes with a cached block, or is held for a neighbour."""
        standing = self._ledger.standing(self._end())
        idle = self._chunked(standing.free | standing.lent | standing.gone, fill=True)
        able: NDArray[np.bool_] = (idle | (block_of != _NO_BLOCK)).all(axis=1)
        able[list(self._owner_of)] = False
        able[:1] = False
        return able

    def _in_the_way(self, block_of: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pairs (chunk, block in it), each once."""
        chunk, within = np.nonzero(block_of != _NO_BLOCK)
        pairs = np.unique(np.stack([chunk, block_of[chunk, within]]), axis=1)
        return pairs[0], pairs[1]

    def _pages(self, chunks: Sequence[int]) -> PageIds:
        return _runs(np.array(chunks, np.int32), self._chunk_pages)

    def _around(self, chunks: Sequence[int]) -> PageIds:
        """The pool's pages in blocks that reach into these chunks, rising, as long as everybody holds whole blocks."""
        pages = _runs(np.unique(self._pages(chunks) // self._pages_per_block), self._pages_per_block)
        return pages[pages < self._ledger.total_pages]


def _runs(numbers: PageIds, length: int) -> PageIds:
    """The pages of runs of `length` pages, run by run."""
    pages: PageIds = np.add.outer(numbers * length, np.arange(length, dtype=np.int32)).astype(np.int32).reshape(-1)
    return pages
