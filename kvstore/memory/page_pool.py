"""KV pages of one model in a growing and shrinking virtual tensor."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.kv_layout import KvLayout
from kvstore.memory.backend import Chunk, VmBackend, VmMisuse
from kvstore.memory.chunks import ChunkPool
from kvstore.memory.vtensor import VirtualTensor


class PagePool:
    """Pages [page, block_tokens, 2, kv_heads, head_dim], addressed by PageId. Of a token, K is at index 0 and V at 1.

    Owns the memory, not who uses which page: that is the ledger's. One thread grows and shrinks; the views may be read
    and written by others as long as their pages are there.
    """

    def __init__(
        self, chunks: ChunkPool, layout: KvLayout, *, owner: str = "kv", capacity_chunks: int | None = None
    ) -> None:
        """Starts empty, with addresses for `capacity_chunks`; None: for the whole budget. Raises ConfigError."""
        pages_per_chunk, rest = divmod(chunks.chunk_bytes, layout.page_bytes)
        if rest:
            raise VmMisuse(f"chunks of {chunks.chunk_bytes} bytes do not hold whole pages of {layout.page_bytes}")
        self._chunks, self._layout = chunks, layout
        self._pages_per_chunk = pages_per_chunk
        capacity_bytes = (capacity_chunks or chunks.budget_chunks) * chunks.chunk_bytes
        self._memory = VirtualTensor(chunks, capacity_bytes, owner=owner)
        self._refresh()

    def _refresh(self) -> None:
        layout = self._layout
        n_pages = self._memory.mapped_bytes // layout.page_bytes
        shape = (n_pages, layout.block_tokens, 2, layout.kv_heads, layout.head_dim)
        tensor = self._memory.tensor(getattr(torch, layout.dtype), shape)
        rows: NDArray[np.uint8] | None = None
        if tensor.device.type == "cpu":
            rows = self._memory.tensor(torch.uint8, (n_pages, layout.page_bytes)).numpy()
        self._n_pages, self._tensor, self._rows = n_pages, tensor, rows  # threads that move pages look at any moment
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
        """All pages, no copy, on the memory's device. A view taken before `grow` stays valid without the new pages."""
        return self._tensor

    @property
    def rows(self) -> NDArray[np.uint8]:
        """The same memory as bytes [page, page_bytes]; of host memory only, else VmMisuse."""
        if self._rows is None:
            raise VmMisuse(f"rows are of host memory; these pages are on {self.device}: use `tensor`")
        return self._rows

    @property
    def backend(self) -> VmBackend:
        """What maps the pages."""
        return self._chunks.backend

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self._chunks.backend.device

    @property
    def chunk_bytes(self) -> int:
        """Length of a chunk."""
        return self._chunks.chunk_bytes

    @property
    def chunk_offsets(self) -> tuple[int, ...]:
        """Where each chunk begins in the shared file, in page order; on a device, what it is named."""
        return self._chunk_offsets

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """What holds the pages, in page order."""
        return self._memory.chunks

    def chunk_of(self, page: int) -> Chunk:
        """What holds a page."""
        if not 0 <= page < self._n_pages:
            raise VmMisuse(f"page {page} of {self._n_pages}")
        return self._memory.chunk(page // self._pages_per_chunk)

    @property
    def memory(self) -> VirtualTensor:
        """The range beneath, for whoever lends its chunks."""
        return self._memory

    def grow(self, n_chunks: int) -> int:
        """Add memory of zeros at the end, all or nothing; returns how many pages it brought. Raises OutOfChunks."""
        first_new = self._n_pages
        self._memory.grow(n_chunks)
        self._refresh()
        if self._tensor.device.type == "cuda":
            _clear(self._tensor[first_new:])
        return n_chunks * self._pages_per_chunk

    def shrink(self, n_chunks: int) -> int:
        """Give memory back from the end; returns how many pages went.

        The caller guarantees that nobody uses them, kernels that were started included.
        """
        self._memory.shrink(n_chunks)
        self._refresh()
        return n_chunks * self._pages_per_chunk

    def clear(self, chunk: int) -> None:
        """Make the pages of a chunk zeros: whatever else lay there may read as not a number."""
        first, end = chunk * self._pages_per_chunk, (chunk + 1) * self._pages_per_chunk
        if self._rows is not None:
            self._rows[first:end] = 0
        elif self.device.type == "cuda":
            _clear(self._tensor[first:end])

    def close(self) -> None:
        """Give back all memory. Every view taken is invalid afterwards."""
        self._tensor, self._rows, self._n_pages = torch.empty(0), np.empty((0, 0), np.uint8), 0
        self._memory.release()


def _clear(pages: Tensor) -> None:
    """Zeros, before anybody uses the pages: a driver's new memory may hold anything, also what reads as not a number."""
    # A stream of its own: nothing that runs elsewhere is waited for.
    stream = torch.cuda.Stream(pages.device)  # type: ignore[no-untyped-call]  # torch has no types here
    with torch.cuda.stream(stream):
        pages.zero_()
    stream.synchronize()
