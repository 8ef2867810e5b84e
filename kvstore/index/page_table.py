"""Which pages hold which token blocks of one sequence, layer by layer."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.ids import PageId

_FIRST_CAPACITY_BLOCKS = 16


class PageTable:
    """[layers, blocks] page ids; grows at its end. The owner appends between engine steps, the engine only reads."""

    __slots__ = ("_ids", "n_blocks")

    def __init__(self, layers: int) -> None:
        self._ids = np.zeros((layers, _FIRST_CAPACITY_BLOCKS), dtype=np.int32)
        self.n_blocks = 0

    @property
    def layers(self) -> int:
        """Number of rows."""
        return self._ids.shape[0]

    @property
    def ids(self) -> NDArray[np.int32]:
        """View [layers, n_blocks]; later appends do not show in it."""
        return self._ids[:, : self.n_blocks]

    def append(self, pages: Sequence[PageId]) -> None:
        """Add whole token blocks: `pages` holds layer 0 of every new block, then layer 1, and so on."""
        blocks, rest = divmod(len(pages), self.layers)
        if rest:
            raise ValueError(f"{len(pages)} pages do not divide over {self.layers} layers")
        needed = self.n_blocks + blocks
        if needed > self._ids.shape[1]:
            wider = np.zeros((self.layers, max(needed, 2 * self._ids.shape[1])), dtype=np.int32)
            wider[:, : self.n_blocks] = self.ids
            self._ids = wider
        self._ids[:, self.n_blocks : needed] = np.asarray(pages, dtype=np.int32).reshape(self.layers, blocks)
        self.n_blocks = needed
