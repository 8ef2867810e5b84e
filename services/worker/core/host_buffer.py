"""Host memory for the KV of requests that are not wholly on the device: who keeps which of its pages. Pure.

Source: eLLM (arXiv 2506.15155), its CPU buffer: a physical size that never changes and a logical one that only bars entries.
"""

from common.ids import Owner, PeerId
from kvstore.index.ledger import Ledger, PageIds, PageState

HOST_BUFFER = PeerId("host-buffer")
"""Under which name the shell's block mover knows this memory; no process can have it, since it names no incarnation."""


class HostBuffer:
    """Owns the ledger of the buffer's pages. Page ids count from 0 and have nothing to do with the device's."""

    def __init__(self, n_pages: int, pages_per_block: int, page_bytes: int = 1) -> None:
        """`n_pages` that have memory; 0: there is no buffer, and nothing is ever admitted."""
        self._ledger = Ledger(n_pages)
        self.block_pages, self.page_bytes = pages_per_block, page_bytes
        self.logical_pages = n_pages

    @property
    def capacity_pages(self) -> int:
        """Pages that have memory."""
        return self._ledger.total_pages

    @property
    def logical_pages(self) -> int:
        """Pages that may be used as far as new entries go; what is kept beyond them stays."""
        return self._logical_pages

    @logical_pages.setter
    def logical_pages(self, n_pages: int) -> None:
        if not 0 <= n_pages <= self.capacity_pages:
            raise ValueError(f"{n_pages} logical pages: must be 0 to {self.capacity_pages}, which have memory")
        self._logical_pages = n_pages

    @property
    def used_pages(self) -> int:
        """Pages that somebody keeps."""
        return self.capacity_pages - self._ledger.free_pages

    def admits(self, n_pages: int) -> bool:
        """Whether so many more pages may enter now."""
        return self.used_pages + n_pages <= self.logical_pages

    def alloc(self, owner: Owner, n_blocks: int) -> PageIds:
        """Pages [blocks, layers] for whole blocks; what `admits` says was asked. Raises OutOfPages beyond the memory."""
        return self.alloc_pages(owner, n_blocks * self.block_pages).reshape(n_blocks, self.block_pages)

    def alloc_pages(self, owner: Owner, n_pages: int) -> PageIds:
        """So many pages [pages], of whichever layers. Raises OutOfPages beyond the memory."""
        return self._ledger.alloc(owner, n_pages, PageState.CACHED)

    def free(self, owner: Owner) -> None:
        """The owner's pages are free; an owner without any is ignored."""
        if self._ledger.state_of(owner) is not None:
            self._ledger.free(owner)

    def check(self) -> None:
        """Raise LedgerMisuse with the numbers if a page is lost or kept twice."""
        self._ledger.check()

    @property
    def owners(self) -> list[Owner]:
        """Everybody who keeps pages; for conservation laws."""
        return list(self._ledger.owners())
