"""A worker's page memory, on the host or on an accelerator: back end, chunks, pages and scratch, opened and closed as one."""

import os
import threading
from collections.abc import Callable
from typing import Protocol

import torch

from common.errors import ConfigError, OutOfChunks
from common.kv_layout import KvLayout
from common.units import format_bytes
from kvstore.memory.available import Available, available_memory, require_available
from kvstore.memory.backend import Chunk, Range, VmBackend
from kvstore.memory.chunks import ChunkPool
from kvstore.memory.cuda_vmm import CudaVmmBackend, open_cuda
from kvstore.memory.memfd import MemfdBackend
from kvstore.memory.page_pool import PagePool
from kvstore.memory.plan import HOST_CHUNK_BYTES, MemoryPlan, device_chunk_bytes, memory_plan
from kvstore.memory.shareable import PROBE_SLOT_BYTES, PROBE_SLOTS, MemoryKind, PagesInFile

HOST = torch.device("cpu")
_SCRATCH_BYTES = PROBE_SLOTS * PROBE_SLOT_BYTES


def _as_it_is(backend: VmBackend) -> VmBackend:
    return backend


def _nobody_else_maps_them(first_page: int) -> None:
    """Where pages are mapped once."""


class Scratch(Protocol):
    """Memory beside the pages in which peers prove that they share it. Offsets count from its beginning."""

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """What is to be exported besides the chunks of pages."""
        ...

    def read(self, offset_bytes: int, n_bytes: int) -> bytes:
        """What lies there."""
        ...

    def discard(self, offset_bytes: int, length_bytes: int) -> None:
        """Make it read as zeros."""
        ...

    def close(self) -> None:
        """Give it back."""
        ...


class FileScratch:
    """The end of the file that holds the pages; takes no memory until it is written."""

    def __init__(self, backend: MemfdBackend, begin_bytes: int) -> None:
        self._backend, self._begin_bytes = backend, begin_bytes

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The pages' descriptor shows it already."""
        return ()

    def read(self, offset_bytes: int, n_bytes: int) -> bytes:
        """What lies there."""
        return os.pread(self._backend.fd, n_bytes, self._begin_bytes + offset_bytes)

    def discard(self, offset_bytes: int, length_bytes: int) -> None:
        """Give its memory back to the system."""
        self._backend.discard(self._begin_bytes + offset_bytes, length_bytes)

    def close(self) -> None:
        """It goes with the file."""


class ChunkScratch:
    """A chunk of its own, which takes memory from the beginning."""

    def __init__(self, backend: CudaVmmBackend) -> None:
        """Raises OutOfChunks."""
        length_bytes = -(-_SCRATCH_BYTES // backend.granularity_bytes) * backend.granularity_bytes
        self._backend = backend
        self._chunk: Chunk = backend.create(length_bytes)
        self._range: Range = backend.reserve(length_bytes)
        backend.map_run(self._range, 0, [self._chunk])
        self._bytes = backend.bytes_at(self._range, length_bytes)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """Its own."""
        return (self._chunk,)

    def read(self, offset_bytes: int, n_bytes: int) -> bytes:
        """A copy. Waits for the device, so that what a peer wrote before it told us is there."""
        return self._bytes[offset_bytes : offset_bytes + n_bytes].cpu().numpy().tobytes()

    def discard(self, offset_bytes: int, length_bytes: int) -> None:
        """Write zeros; the memory stays."""
        self._bytes[offset_bytes : offset_bytes + length_bytes].zero_()

    def close(self) -> None:
        """Give the chunk back."""
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._backend.unmap_run(self._range, 0, 1)
        self._backend.unreserve(self._range)
        self._backend.release(self._chunk)


class PageMemory:
    """Everything that `--device-memory` stands for; a Shareable. The process that opened it closes it.

    The thread that opened it resizes and closes it; any thread may look, and export.
    """

    def __init__(
        self, backend: VmBackend, pages: PagePool, chunks: ChunkPool, plan: MemoryPlan, scratch: Scratch
    ) -> None:
        """Takes over all of them; `open_page_memory` puts them together."""
        self.backend, self.pages, self.chunks, self.plan = backend, pages, chunks, plan
        self._scratch = scratch
        self._generation = 0
        self._low_marks: tuple[tuple[int, int], ...] = ()
        self.vm_lock = threading.Lock()
        """Held by whoever uses the back end: `resize` does, and everybody who maps pages elsewhere too."""
        self.before_leaving: Callable[[int], None] = _nobody_else_maps_them
        """Called with the first page that is about to lose its memory, without a lock: for who maps pages elsewhere."""
        self._lock = threading.Lock()  # no chunk goes while it is exported or told of

    @property
    def kind(self) -> MemoryKind:
        """How others map it."""
        return "cuda" if isinstance(self.backend, CudaVmmBackend) else "memfd"

    @property
    def device_uuid(self) -> str:
        """The device, 32 hex digits; "" for host memory."""
        return self.backend.device_uuid if isinstance(self.backend, CudaVmmBackend) else ""

    @property
    def probe_offset_bytes(self) -> int:
        """Where the PROBE_SLOTS slots begin: behind all that there may ever be."""
        return self.plan.limit_chunks * self.plan.chunk_bytes

    @property
    def pages_in_file(self) -> PagesInFile:
        """Where the pages lie now."""
        with self._lock:  # else chunks that are about to go would be told as of the generation after them
            offsets, generation, low_marks = self.pages.chunk_offsets, self._generation, self._low_marks
        plan = self.plan
        if self.kind == "cuda":  # descriptors come in page order, so each chunk lies behind the one before it
            offsets = tuple(place * plan.chunk_bytes for place in range(len(offsets)))
        return PagesInFile(
            self.pages.layout.page_bytes, plan.chunk_bytes, offsets, generation, low_marks, plan.limit_chunks
        )

    def export_fds(self, first: int = 0, n_fds: int | None = None) -> list[int]:
        """New descriptors, which the caller closes: the one file, or each chunk in page order and then scratch."""
        with self._lock:
            everything = (*self.pages.chunks, *self._scratch.chunks)
            return self.backend.export_fds(everything[first:][:n_fds])

    def read_scratch(self, offset_bytes: int, n_bytes: int) -> bytes:
        """What lies in a stretch of scratch now."""
        return self._scratch.read(offset_bytes - self.probe_offset_bytes, n_bytes)

    def discard(self, offset_bytes: int, length_bytes: int) -> None:
        """Make a stretch of scratch read as zeros."""
        self._scratch.discard(offset_bytes - self.probe_offset_bytes, length_bytes)

    def chunks_for(self, n_pages: int) -> int:
        """The fewest chunks that hold pages 0 to n_pages - 1."""
        return -(-n_pages * self.plan.page_bytes // self.plan.chunk_bytes)

    def resize(self, n_chunks: int, *, settled: bool = False) -> int:
        """Grow or shrink to `n_chunks` at the end; returns how many pages there are then.

        Which pages nobody uses, the block pool's own `resize` tells: to shrink, call that first, and this with
        `chunks_for` what it returns; to grow, call this first.

        Growing is all or nothing: raises OutOfChunks for more than the device or the address range has. Shrinking waits
        for what runs on the device, unless it has `settled` since the pages that go were used last; the caller
        guarantees that nothing is started meanwhile that uses them.
        Peers must map anew before they use pages that came back later (`PagesInFile.generation`).
        """
        change = n_chunks - len(self.pages.chunks)
        if change > 0:
            self.require_room(n_chunks)
            self.chunks.set_budget(self.chunks.budget_chunks + change)
            try:
                with self.vm_lock:
                    self.pages.grow(change)
            except OutOfChunks:
                self.chunks.set_budget(self.chunks.budget_chunks - change)
                raise
        elif change < 0:
            if not settled:
                self.settle()
            self.before_leaving(n_chunks * (self.plan.chunk_bytes // self.plan.page_bytes))
            with self.vm_lock, self._lock:
                self._generation += 1
                lower = (mark for mark in self._low_marks if mark[1] < n_chunks)  # the others say less than this one
                self._low_marks = (*lower, (self._generation, n_chunks))
                self.pages.shrink(-change)
            self.chunks.set_budget(self.chunks.budget_chunks + change)
        return self.pages.n_pages

    def require_room(self, n_chunks: int) -> None:
        """Raise OutOfChunks, with the numbers, unless `resize` could give so many now."""
        if n_chunks > self.plan.limit_chunks:
            asked, limit = (format_bytes(n * self.plan.chunk_bytes) for n in (n_chunks, self.plan.limit_chunks))
            raise OutOfChunks(f"{asked} asked for; this process has addresses for {limit}")
        free, needed_bytes = (
            _free_memory(self.backend.device),
            (n_chunks - len(self.pages.chunks)) * self.plan.chunk_bytes,
        )
        if needed_bytes > free.n_bytes:
            raise OutOfChunks(
                f"{format_bytes(needed_bytes)} more asked for; {format_bytes(free.n_bytes)} are available ({free.limit})"
            )

    def settle(self) -> None:
        """Wait for what runs on the device: there, who meets an address without memory ends the whole process's work."""
        if isinstance(self.backend, CudaVmmBackend):
            self.backend.wait()

    def close(self) -> None:
        """Give back all memory, after what runs on the device. Every view taken of the pages is invalid afterwards."""
        self.settle()
        self.pages.close()
        self._scratch.close()
        self.chunks.close()


def open_page_memory(
    budget_bytes: int,
    layout: KvLayout,
    device: torch.device = HOST,
    *,
    page_chunks: bool = False,
    wrap: Callable[[VmBackend], VmBackend] = _as_it_is,
) -> PageMemory:
    """A page pool that fills its whole budget now, and may be resized up to all of the
    device's memory, on the host to what is available now.

    With `page_chunks` each page is a chunk of its own, which sequences can show in their own order; `virtual_block_tokens`
    tells the blocks that this needs. `wrap`: put around the back end, for all that is mapped.
    Raises ConfigError if the budget exceeds the memory available, or does not hold one token block.
    """
    free = _free_memory(device)
    require_available(budget_bytes, free)
    if device.type == "cuda":
        near_bytes = None if page_chunks else device_chunk_bytes(budget_bytes)
        return _open_device(budget_bytes, layout, device, near_bytes, wrap)
    near_bytes = None if page_chunks else HOST_CHUNK_BYTES
    return _open_host(budget_bytes, layout, near_bytes, free.n_bytes, wrap)


def whole_memory_bytes(device: torch.device) -> int:
    """What a MemoryShare is a share of: all memory of a CUDA device; on the host, what is available now."""
    if device.type != "cuda":
        return available_memory().n_bytes
    _, total_bytes = torch.cuda.mem_get_info(device)
    return total_bytes


def _free_memory(device: torch.device) -> Available:
    if device.type != "cuda":
        return available_memory()
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return Available(free_bytes, f"free memory of {device}")


def _open_host(
    budget_bytes: int,
    layout: KvLayout,
    near_bytes: int | None,
    limit_bytes: int,
    wrap: Callable[[VmBackend], VmBackend],
) -> PageMemory:
    plan = memory_plan(budget_bytes, layout, os.sysconf("SC_PAGE_SIZE"), near_bytes, limit_bytes=limit_bytes)
    limit = plan.limit_chunks * plan.chunk_bytes
    backend = MemfdBackend(limit, scratch_bytes=_SCRATCH_BYTES)
    return _fill(backend, layout, plan, FileScratch(backend, limit), wrap)


def _open_device(
    budget_bytes: int,
    layout: KvLayout,
    device: torch.device,
    near_bytes: int | None,
    wrap: Callable[[VmBackend], VmBackend],
) -> PageMemory:
    limit_bytes = whole_memory_bytes(device)
    backend = open_cuda(device)
    try:
        plan = memory_plan(budget_bytes, layout, backend.granularity_bytes, near_bytes, limit_bytes=limit_bytes)
        scratch = ChunkScratch(backend)
    except OutOfChunks as error:
        backend.close()
        raise ConfigError(
            f"--device-memory={format_bytes(budget_bytes)} leaves no room on {device}: {error}"
        ) from error
    except ConfigError:
        backend.close()
        raise
    return _fill(backend, layout, plan, scratch, wrap)


def _fill(
    backend: VmBackend, layout: KvLayout, plan: MemoryPlan, scratch: Scratch, wrap: Callable[[VmBackend], VmBackend]
) -> PageMemory:
    chunks = ChunkPool(wrap(backend), plan.budget_bytes, plan.chunk_bytes)
    pages = PagePool(chunks, layout, capacity_chunks=plan.limit_chunks)
    try:
        pages.grow(plan.chunks)
    except OutOfChunks as error:
        backend.close()
        budget = format_bytes(plan.budget_bytes)
        raise ConfigError(f"--device-memory={budget} cannot be taken on {backend.device}: {error}") from error
    return PageMemory(backend, pages, chunks, plan, scratch)
