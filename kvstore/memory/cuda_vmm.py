"""An accelerator's own memory under CUDA's virtual memory management.

A chunk is one driver handle, which other processes map through a descriptor of its own. What costs is counted by the
chunk, whatever its length: access above all, in one call for a run or in many (docs/benchmarks/gpu.md). No call waits for
kernels.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from common.errors import ServingError
from common.units import format_bytes
from kvstore.memory.backend import Chunk, Range, VmMisuse
from kvstore.memory.cuda_driver import CudaDriver
from kvstore.memory.mappings import MappingTable, create_each, require_mappings

MAX_LIVE_MAPPINGS = 500_000
"""One context fails with other errors a little above this number."""


class CudaVmmBackend:
    """VmBackend over one device. Owns a handle for each chunk.

    A chunk's `offset_bytes` is a name that is never given twice. New chunks hold whatever their memory held before.
    """

    def __init__(self, device: torch.device, driver: CudaDriver) -> None:
        """Takes over `driver`."""
        self._device, self._driver = device, driver
        self._table = MappingTable(driver.granularity_bytes)
        self._handles: dict[Chunk, int] = {}
        self._next_name_bytes = 0
        self._closed = False

    @property
    def device(self) -> torch.device:
        """The device."""
        return self._device

    @property
    def device_uuid(self) -> str:
        """Names the device across processes: 32 hex digits."""
        return self._driver.device_uuid

    @property
    def granularity_bytes(self) -> int:
        """Smallest mappable unit: 2 MiB on data-centre devices."""
        return self._driver.granularity_bytes

    @property
    def live_mappings(self) -> int:
        """Chunks mapped now, each as often as it is mapped."""
        return self._table.live

    @property
    def max_mappings(self) -> int:
        """What one context bears."""
        return MAX_LIVE_MAPPINGS

    def reserve(self, length_bytes: int) -> Range:
        """Take an address range without memory; terabytes are cheap. Raises OutOfChunks if no addresses are left."""
        self._table.require_aligned("range", length_bytes)
        where = Range(self._driver.reserve(length_bytes), length_bytes)
        self._table.add_range(where)
        return where

    def unreserve(self, where: Range) -> None:
        """Give the addresses back."""
        self._table.drop_range(where)
        self._driver.unreserve(where.address, where.length_bytes)

    def create(self, length_bytes: int) -> Chunk:
        """Physical memory: a new handle. Raises OutOfChunks."""
        self._table.require_aligned("chunk", length_bytes)
        chunk = Chunk(self._next_name_bytes, length_bytes)
        self._handles[chunk] = self._driver.create(length_bytes)
        self._next_name_bytes += length_bytes
        self._table.add_chunk(chunk)
        return chunk

    def create_run(self, length_bytes: int, n_chunks: int) -> list[Chunk]:
        """A new handle for each, all or none. Raises OutOfChunks."""
        return create_each(self, length_bytes, n_chunks)

    def release(self, chunk: Chunk) -> None:
        """Give physical memory back to the device. A peer that maps it keeps it alive."""
        self._table.drop_chunk(chunk)
        self._driver.release(self._handles.pop(chunk))

    def map_run(self, where: Range, offset_bytes: int, chunks: Sequence[Chunk]) -> None:
        """Make the chunks readable and writable there, with one access call."""
        require_mappings(self, len(chunks))
        self._table.add_run(where, offset_bytes, chunks)
        begin = end = where.address + offset_bytes
        try:
            for chunk in chunks:
                self._driver.map(end, chunk.length_bytes, self._handles[chunk])
                end += chunk.length_bytes
            if chunks:
                self._driver.allow(begin, end - begin)
        except (ServingError, VmMisuse):
            self._table.remove_run(where, offset_bytes, len(chunks))
            if end > begin:
                self._driver.unmap(begin, end - begin)
            raise

    def unmap_run(self, where: Range, offset_bytes: int, n_chunks: int) -> list[Chunk]:
        """Undo the mappings of a run, with one call. The caller guarantees that no kernel uses those addresses."""
        chunks = self._table.remove_run(where, offset_bytes, n_chunks)
        if chunks:
            self._driver.unmap(where.address + offset_bytes, sum(chunk.length_bytes for chunk in chunks))
        return chunks

    def keep_for_undoing(self, n_mappings: int) -> None:
        """Nothing: chunks are counted one by one here, so to undo needs no more of the context than there was."""

    def undoing(self) -> AbstractContextManager[None]:
        """Like other calls. If the driver is out of memory of its own even then, whoever undoes ends the process."""
        return nullcontext()

    def export_fds(self, chunks: Sequence[Chunk]) -> list[int]:
        """A new descriptor for each chunk, which the caller closes; all or none. An open one keeps the memory.

        Raises VmMisuse if the driver makes no more, for example because too many files are open.
        """
        fds: list[int] = []
        try:
            for chunk in chunks:
                fds.append(self._driver.export_fd(self._handles[chunk]))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return fds

    def bytes_at(self, where: Range, n_bytes: int) -> Tensor:
        """The beginning of a range, not copied, however much of it is mapped."""
        if n_bytes > where.length_bytes:
            raise VmMisuse(f"{n_bytes} bytes of a range of {format_bytes(where.length_bytes)}")
        empty = torch.empty(0, dtype=torch.uint8, device=self._device)
        if n_bytes == 0:
            return empty
        # torch has no public way to wrap addresses that are mapped only in part: this one asks the driver nothing.
        storage = torch._C._construct_storage_from_data_pointer(where.address, self._device, n_bytes)
        return empty.set_(storage, 0, (n_bytes,), (1,))

    def wait(self) -> None:
        """Until nothing that was started on the device runs any more, so that what it used may be unmapped."""
        self._driver.wait()

    def close(self) -> None:
        """Unmap every range, give all memory back, let go of the device. The caller guarantees that no kernel runs."""
        if self._closed:
            return
        for where in self._table.ranges:
            for start, chunk in self._table.mapped(where).items():
                self._driver.unmap(where.address + start, chunk.length_bytes)
            self._driver.unreserve(where.address, where.length_bytes)
        for handle in self._handles.values():
            self._driver.release(handle)
        self._handles.clear()
        self._driver.close()
        self._closed = True


def open_cuda(device: torch.device) -> CudaVmmBackend:
    """The back end of a CUDA device. Raises ConfigError if the driver or the device cannot do it."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return CudaVmmBackend(torch.device("cuda", index), CudaDriver(index))
