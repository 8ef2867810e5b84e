"""A peer's device pages, mapped into this process."""

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.errors import PeerFailed
from kvstore.transport.descriptions import ChunksDescription, Description, require_consistent
from kvstore.transport.device_tensor import bytes_at
from kvstore.transport.page_mover import PageMover
from kvstore.transport.refusals import refusals
from kvstore.transport.uses import Uses

_MEASURED_BYTES = 64 * 2**20
"""Copied in each round: more than a cache of the device holds, and long enough that launching is no part of it."""
_ROUNDS = 4


class ImportDriver(Protocol):
    """Maps memory that another process exported. Of `kvstore.memory.cuda_driver.CudaDriver`; any thread may call."""

    granularity_bytes: int
    """Smallest mappable unit."""

    def create(self, length_bytes: int) -> int:
        """A handle of new physical memory. Raises OutOfChunks."""
        ...

    def reserve(self, length_bytes: int) -> int:
        """Addresses without memory."""
        ...

    def unreserve(self, address: int, length_bytes: int) -> None:
        """Give addresses back, where nothing is mapped any more."""
        ...

    def import_fd(self, fd: int) -> int:
        """A handle of the memory behind a descriptor, which stays the caller's."""
        ...

    def map(self, address: int, length_bytes: int, handle: int) -> None:
        """Put the handle's memory there; nobody may touch it before `allow`."""
        ...

    def allow(self, address: int, length_bytes: int) -> None:
        """Make a wholly mapped stretch readable and writable for this process's device."""
        ...

    def unmap(self, address: int, length_bytes: int) -> None:
        """Undo every mapping in a stretch."""
        ...

    def release(self, handle: int) -> None:
        """Drop a handle; its memory goes once nobody maps it."""
        ...


class ImportedRange:
    """One range of addresses, with chunks of another process mapped from its beginning. One thread at a time.

    Handles are released as soon as they are mapped: then unmapping alone gives the memory back.
    """

    def __init__(self, driver: ImportDriver, capacity_bytes: int) -> None:
        """Raises PeerFailed if there are not so many addresses."""
        self._driver, self._capacity_bytes = driver, capacity_bytes
        with refusals("reserve addresses for"):
            self.address = driver.reserve(capacity_bytes)
        self.mapped_bytes = 0

    def add(self, fds: Sequence[int], chunk_bytes: int) -> None:
        """Map a chunk for each descriptor behind those there, with one access call; all or none. Raises PeerFailed."""
        begin = end = self.address + self.mapped_bytes
        if self.mapped_bytes + len(fds) * chunk_bytes > self._capacity_bytes:
            raise PeerFailed(f"{len(fds)} chunks more than the {self._capacity_bytes} bytes that were announced")
        with refusals("map"):
            try:
                for fd in fds:
                    handle = self._driver.import_fd(fd)
                    try:
                        self._driver.map(end, chunk_bytes, handle)
                    finally:
                        self._driver.release(handle)
                    end += chunk_bytes
                if end > begin:
                    self._driver.allow(begin, end - begin)
            except BaseException:
                if end > begin:
                    self._driver.unmap(begin, end - begin)
                raise
        self.mapped_bytes += end - begin

    def cut(self, length_bytes: int) -> None:
        """Unmap what lies behind the first `length_bytes`. No kernel uses those addresses any more."""
        if length_bytes < self.mapped_bytes:
            self._driver.unmap(self.address + length_bytes, self.mapped_bytes - length_bytes)
            self.mapped_bytes = length_bytes

    def close(self) -> None:
        """Unmap everything and give the addresses back."""
        self.cut(0)
        self._driver.unreserve(self.address, self._capacity_bytes)


@dataclass(frozen=True, slots=True)
class Prober:
    """What tries peers' memory, one for all peers: torch hands out few streams, in turn, and the engine has one too."""

    mover: PageMover
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held by whoever uses the mover."""


class CudaSharedPages:
    """Keeps the mapping until `close`, which waits for the uses in progress. Any thread may call.

    The memory may be of our device, or of another one that ours reaches. The peer's death does not touch the mapping.
    """

    kind = "cuda_ipc"

    def __init__(self, description: ChunksDescription, scratch_fd: int, driver: ImportDriver, prober: Prober) -> None:
        """Maps the scratch alone. `scratch_fd` stays the caller's. Raises PeerFailed."""
        require_consistent(description)
        self._description, self._driver, self._prober = description, driver, prober
        self._device = device = prober.mover.device
        self._uses = Uses(f"the memory of {description.peer}")
        self._scratch = ImportedRange(driver, description.scratch_bytes)
        try:
            self._scratch.add([scratch_fd], description.scratch_bytes)
            self._pages = ImportedRange(driver, max(1, description.capacity_chunks) * description.chunk_bytes)
        except PeerFailed:
            self._scratch.close()
            raise
        whole = bytes_at(self._pages.address, description.capacity_chunks * description.chunk_bytes, device)
        self._rows = whole.view(-1, description.page_bytes)
        self._closing = threading.Lock()  # who closes it second waits for the first
        self.gib_per_s = 0.0
        """As measured by the probe."""

    @property
    def description(self) -> ChunksDescription:
        """What the peer said of its memory, last."""
        return self._description

    @property
    def closed(self) -> bool:
        """Whether it is unmapped, or about to be."""
        return self._uses.closed

    @property
    def n_pages(self) -> int:
        """Pages that are mapped: of chunks that are described and have come."""
        return self._pages.mapped_bytes // self._description.page_bytes

    @property
    def missing_chunks(self) -> int:
        """Chunks that are described and have not come."""
        return self._description.n_chunks - self._pages.mapped_bytes // self._description.chunk_bytes

    def add_chunks(self, fds: Sequence[int]) -> None:
        """Map the next chunks. The caller closes `fds`. Raises PeerFailed."""
        with self._uses.alone():
            self._pages.add(fds, self._description.chunk_bytes)

    def redescribe(self, description: Description) -> None:
        """The pool has changed: unmap the chunks it has no more, after the uses in progress. Raises PeerFailed."""
        old = self._description
        if not isinstance(description, ChunksDescription) or (
            (description.page_bytes, description.chunk_bytes, description.capacity_chunks)
            != (old.page_bytes, old.chunk_bytes, old.capacity_chunks)
        ):
            raise PeerFailed(f"{old.peer} describes another kind of memory than before")
        require_consistent(description)
        with self._uses.alone(), refusals("unmap"):
            self._pages.cut(description.kept_chunks(old.generation) * description.chunk_bytes)
            self._description = description

    @contextmanager
    def using(self) -> Iterator[Tensor]:
        """The mapped pages [page, page_bytes], which stay mapped inside; whoever launches work there waits for it inside.

        Several threads may be inside at once; not to be nested. Raises PeerFailed once closed.
        """
        with self._uses.inside():
            yield self._rows[: self.n_pages]

    def write_probe(self, pattern: bytes) -> None:
        """Write into this connection's scratch, by a copy of the device. Raises PeerFailed once closed."""
        mover = self._prober.mover
        with self._uses.inside(), self._prober.lock, mover.launching():
            first_bytes = self._scratch.address + self._description.probe_offset_bytes
            there = bytes_at(first_bytes, len(pattern), self._device)
            there.copy_(torch.frombuffer(bytearray(pattern), dtype=torch.uint8).to(self._device))
            mover.finish()

    def measure_gib_per_s(self) -> float:
        """How fast its pages come by a copy of the device; its scratch is written if it has none. Raises PeerFailed."""
        if self.n_pages == 0:
            pattern = secrets.token_bytes(self._description.probe_bytes)
            began_s = time.perf_counter()
            self.write_probe(pattern)
            return len(pattern) / max(time.perf_counter() - began_s, 1e-9) / 2**30
        mover, page_bytes = self._prober.mover, self._description.page_bytes
        with self.using() as rows, self._prober.lock:
            n_pages = max(1, min(len(rows), _MEASURED_BYTES // page_bytes))
            with _buffer(self._driver, n_pages * page_bytes, mover) as buffer, mover.launching():
                here, ids = buffer.view(-1, page_bytes), np.arange(n_pages)
                mover.move(rows, ids, here, ids)  # not measured: loads the kernel
                mover.finish()
                began_s = time.perf_counter()
                for number in range(_ROUNDS):
                    mover.move(rows, (ids + number * n_pages) % len(rows), here, ids)
                mover.finish()
                elapsed_s = time.perf_counter() - began_s
        return _ROUNDS * n_pages * page_bytes / max(elapsed_s, 1e-9) / 2**30

    def close(self) -> None:
        """Unmap, after the uses in progress. Nothing is written through this object afterwards."""
        self._uses.close()
        with self._closing:
            if self._pages.address:
                self._rows = torch.empty((0, self._description.page_bytes), dtype=torch.uint8, device=self._device)
                self._pages.close()
                self._scratch.close()
                self._pages.address = 0


@contextmanager
def _buffer(driver: ImportDriver, n_bytes: int, mover: PageMover) -> Iterator[Tensor]:
    """Memory of the mover's device, back at the system afterwards. Raises PeerFailed if there is not so much.

    torch's own would stay with it for as long as the process runs, for this one use.
    """
    length_bytes = -(-n_bytes // driver.granularity_bytes) * driver.granularity_bytes
    with refusals("make room to try"):
        address = driver.reserve(length_bytes)
        try:
            handle = driver.create(length_bytes)
            try:
                driver.map(address, length_bytes, handle)
            finally:
                driver.release(handle)
        except BaseException:
            driver.unreserve(address, length_bytes)
            raise
        try:
            driver.allow(address, length_bytes)
            try:
                yield bytes_at(address, n_bytes, mover.device)
            finally:
                mover.finish()  # also after an error: what was launched may write there still
        finally:
            driver.unmap(address, length_bytes)
            driver.unreserve(address, length_bytes)


class CudaMapper:
    """ChunkMapper of one device."""

    def __init__(self, driver: ImportDriver, device: torch.device) -> None:
        """`driver`: of `device`; the caller closes it, after every mapping."""
        self._driver, self._prober = driver, Prober(PageMover(device))
        self.turn = threading.Lock()
        """Held by the visit that takes a batch of descriptors."""

    def open(self, description: ChunksDescription, scratch_fd: int) -> CudaSharedPages:
        """Map the scratch, and reserve addresses for the chunks. Raises PeerFailed."""
        return CudaSharedPages(description, scratch_fd, self._driver, self._prober)
