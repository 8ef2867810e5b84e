"""KV pages of one model in a growing and shrinking virtual tensor."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.kv_layout import KvLayout
from kvstore.memory.backend import VmMisuse
from kvstore.memory.chunks import ChunkPool
from kvstore.memory.vtensor import VirtualTensor


class PagePool:
    """Pages [page, 2, block_tokens, kv_heads, head_dim], addressed by PageId. K is index 0 of the second axis, V is 1.

    Owns the memory, not who uses which page: that is the ledger's. One thread grows and shrinks; the views may be read
    and written by others as long as their pages are there.
    """

    def __init__(self, chunks: ChunkPool, layout: KvLayout, *, owner: str = "kv") -> None:
        """Starts empty, with addresses for the whole budget. Raises ConfigError."""
        pages_per_chunk, rest = divmod(chunks.chunk_bytes, layout.page_bytes)
        if rest:
            raise VmMisuse(f"chunks of {chunks.chunk_bytes} bytes do not hold whole pages of {layout.page_bytes}")
        self._chunks, self._layout = chunks, layout
        self._pages_per_chunk = pages_per_chunk
        self._memory = VirtualTensor(chunks, chunks.budget_chunks * chunks.chunk_bytes, owner=owner)
        self._refresh()

    def _refresh(self) -> None:
        layout = self._layout
        self._n_pages = self._memory.mapped_bytes // layout.page_bytes
        shape = (self._n_pages, 2, layout.block_tokens, layout.kv_heads, layout.head_dim)
        self._tensor = self._memory.tensor(getattr(torch, layout.dtype), shape)
        rows: NDArray[np.uint8] = self._memory.tensor(torch.uint8, (self._n_pages, layout.page_bytes)).numpy()
        self._rows = rows
        self._chunk_offsets = tuple(chunk.offset_bytes for chunk in self._memory.chunks)

    @property
    def layout(self) -> KvLayout:
        """Shape of a page."""
        return self._layout

    @property
    def n_pages(self) -> int:
        """Pages that have memory: ids 0 to n_pages - 1."""
        return self._n_pages

    @property
    def tensor(self) -> Tensor:
        """All pages, no copy. A view taken before `grow` stays valid and does not show the new pages."""
        return self._tensor

    @property
    def rows(self) -> NDArray[np.uint8]:
        """The same memory as bytes [page, page_bytes]."""
        return self._rows

    @property
    def address(self) -> int:
        """Where page 0 begins; page p begins p * page_bytes further."""
        return self._memory.address

    @property
    def chunk_bytes(self) -> int:
        """Length of a chunk."""
        return self._chunks.chunk_bytes

    @property
    def chunk_offsets(self) -> tuple[int, ...]:
        """Where each chunk begins in the shared file, in page order."""
        return self._chunk_offsets

    def page_offset_bytes(self, page: int) -> int:
        """Where a page begins in the shared file."""
        if not 0 <= page < self._n_pages:
            raise VmMisuse(f"page {page} of {self._n_pages}")
        chunk, within = divmod(page, self._pages_per_chunk)
        return self._chunk_offsets[chunk] + within * self._layout.page_bytes

    def export_fd(self) -> int:
        """Descriptor of the shared file; stays the pool's."""
        return self._chunks.backend.export_fd()

    def grow(self, n_chunks: int) -> int:
        """Add memory at the end, all or nothing; returns how many pages it brought. Raises OutOfChunks."""
        self._memory.grow(n_chunks)
        self._refresh()
        return n_chunks * self._pages_per_chunk

    def shrink(self, n_chunks: int) -> int:
        """Give memory back from the end; returns how many pages went. The caller guarantees that nobody uses them."""
        self._memory.shrink(n_chunks)
        self._refresh()
        return n_chunks * self._pages_per_chunk

    def close(self) -> None:
        """Give back all memory. Every view taken is invalid afterwards."""
        self._tensor, self._rows, self._n_pages = torch.empty(0), np.empty((0, 0), np.uint8), 0
        self._memory.release()
