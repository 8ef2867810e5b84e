"""Which pages hold which token blocks of one sequence, layer by layer."""

import numpy as np
from numpy.typing import NDArray

_FIRST_CAPACITY_BLOCKS = 16


class PageTable:
    """[layers, blocks] page ids; grows at its end. Its owner appends at any time, also while an engine's thread reads: what
    was there stays, and `ids` is one look, to be taken once by whoever needs a length and what is there to agree."""

    __slots__ = ("_ids", "n_blocks", "whole")

    def __init__(self, layers: int) -> None:
        self._ids = np.zeros((layers, _FIRST_CAPACITY_BLOCKS), dtype=np.int32)
        self.n_blocks = 0
        self.whole = True
        """Whether the pages of every block are neighbours, layer by layer: its first page then tells all of them."""

    @property
    def layers(self) -> int:
        """Number of rows."""
        return self._ids.shape[0]

    def blocks(self, first: int, end: int) -> NDArray[np.int32]:
        """A copy [end - first, layers]: the pages of some blocks, block by block."""
        return np.ascontiguousarray(self._ids[:, first:end].T)

    @property
    def ids(self) -> NDArray[np.int32]:
        """View [layers, n_blocks]; later appends do not show in it."""
        n_blocks = self.n_blocks  # before the array: one that is replaced meanwhile still holds as many
        return self._ids[:, :n_blocks]

    def first_page(self, block: int) -> int:
        """The page of layer 0 of a block."""
        return int(self._ids[0, block])

    def append(self, pages: NDArray[np.int32]) -> None:
        """Add whole token blocks: `pages` [blocks, layers]. Raises ValueError for another number of layers."""
        if pages.ndim != 2 or pages.shape[1] != self.layers:
            raise ValueError(f"pages {pages.shape} do not name {self.layers} layers for each block")
        needed = self.n_blocks + pages.shape[0]
        self.whole = self.whole and bool((pages[:, 1:] - pages[:, :-1] == 1).all())
        if needed > self._ids.shape[1]:
            wider = np.zeros((self.layers, max(needed, 2 * self._ids.shape[1])), dtype=np.int32)
            wider[:, : self.n_blocks] = self.ids
            self._ids = wider
        self._ids[:, self.n_blocks : needed] = pages.T
        self.n_blocks = needed
