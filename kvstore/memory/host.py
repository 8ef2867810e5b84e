"""A worker's page memory on the host: back end, chunks and pages, opened and closed as one."""

import mmap
from dataclasses import dataclass

from common.kv_layout import KvLayout
from kvstore.memory.available import available_memory, require_available
from kvstore.memory.chunks import ChunkPool
from kvstore.memory.memfd import MemfdBackend
from kvstore.memory.page_pool import PagePool
from kvstore.memory.plan import MemoryPlan, memory_plan

PROBE_SLOT_BYTES = 2 * 2**20
PROBE_SLOTS = 64


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
