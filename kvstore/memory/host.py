"""A worker's page memory on the host: back end, chunks and pages, opened and closed as one."""

import mmap
from dataclasses import dataclass

from common.kv_layout import KvLayout
from kvstore.memory.available import available_memory, require_available
from kvstore.memory.chunks import ChunkPool
from kvstore.memory.memfd import MemfdBackend
from kvstore.memory.page_pool import PagePool
from kvstore.memory.plan import MemoryPlan, memory_plan
from kvstore.memory.shareable import PROBE_SLOT_BYTES, PROBE_SLOTS, PagesInFile


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Everything that `--device-memory` stands for on a CPU. The process that opened it closes it."""

    backend: MemfdBackend
    chunks: ChunkPool
    pages: PagePool
    plan: MemoryPlan

    @property
    def probe_offset_bytes(self) -> int:
        """Where the PROBE_SLOTS slots begin in the shared file; they cost nothing until a peer writes there."""
        return self.plan.chunks * self.plan.chunk_bytes

    @property
    def pages_in_file(self) -> PagesInFile:
        """Where the pages lie now."""
        return PagesInFile(self.pages.layout.page_bytes, self.pages.chunk_bytes, self.pages.chunk_offsets)

    def export_fd(self) -> int:
        """Descriptor of the shared file; stays ours."""
        return self.backend.export_fd()

    def discard(self, offset_bytes: int, length_bytes: int) -> None:
        """Give back the memory of a stretch of scratch."""
        self.backend.discard(offset_bytes, length_bytes)

    def close(self) -> None:
        """Give back all memory. Every view taken of the pages is invalid afterwards."""
        self.pages.close()
        self.chunks.close()


def open_host_memory(budget_bytes: int, layout: KvLayout) -> HostMemory:
    """A page pool that fills its whole budget now.

    Raises ConfigError if the budget exceeds the memory available, or does not hold one token block.
    """
    require_available(budget_bytes, available_memory())
    plan = memory_plan(budget_bytes, layout, mmap.PAGESIZE)
    backend = MemfdBackend(plan.chunks * plan.chunk_bytes, scratch_bytes=PROBE_SLOTS * PROBE_SLOT_BYTES)
    chunks = ChunkPool(backend, plan.budget_bytes, plan.chunk_bytes)
    pages = PagePool(chunks, layout)
    pages.grow(plan.chunks)
    return HostMemory(backend, chunks, pages, plan)
