"""Host memory as a Linux memfd: one file in memory whose parts are mapped where they are needed.

A chunk is a stretch of the file. Creating one allocates its pages at once, so that memory which was promised is there
and never faults later; releasing one punches a hole, so that the memory really goes back to the system. Other
processes map the same file through its descriptor; the kernel frees it when the last of them dies.
"""

import contextlib
import ctypes
import errno
import fcntl
import heapq
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import ConfigError, OutOfChunks
from common.units import format_bytes
from kvstore.memory.backend import Chunk, Range, VmMisuse
from kvstore.memory.mapping_reserve import MAP_EMPTY, MAP_FAILED, PROT_NONE, MappingReserve
from kvstore.memory.mappings import MappingTable, stretches

if TYPE_CHECKING:
    import torch

_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED = 0x10
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01
_KERNEL_MAPPINGS = 65_530  # Linux's own setting
_OTHER_MAPPINGS = 8_192  # libraries, heaps and threads of a process that runs torch take 1,000 to 3,000


class MemfdBackend:
    """VmBackend over one memfd of `capacity_bytes`, plus `scratch_bytes` behind it that no chunk ever uses.

    Scratch costs nothing until it is written; peers prove there that they share this memory.
    """

    def __init__(self, capacity_bytes: int, *, scratch_bytes: int = 0) -> None:
        self._table = MappingTable(mmap.PAGESIZE)
        self._table.require_aligned("capacity", capacity_bytes)
        self._capacity_bytes = capacity_bytes
        self._libc = _load_libc()
        self._reserve = MappingReserve(self._libc)
        self._fd = os.memfd_create("penstock-pages", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, capacity_bytes + scratch_bytes)
        # Peers hold this descriptor too; none of them may cut the file short under our mappings.
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._holes: dict[int, list[int]] = {}  # chunk length -> heap of free offsets
        self._end_bytes = 0
        self._max_mappings = max(1, _kernel_mappings() - _OTHER_MAPPINGS)
        self._vacated: set[Chunk] = set()

    @property
    def granularity_bytes(self) -> int:
        """Smallest mappable unit."""
        return mmap.PAGESIZE

    @property
    def device(self) -> "torch.device":
        """The host."""
        import torch  # here: a KV store has this memory too, and no torch

        return torch.device("cpu")

    @property
    def fd(self) -> int:
        """Our descriptor of the file; stays ours. `export_fds` gives others theirs."""
        return self._fd

    @property
    def resident_bytes(self) -> int:
        """Memory that the file really takes, as the kernel counts it."""
        return os.fstat(self._fd).st_blocks * 512

    def reserve(self, length_bytes: int) -> Range:
        """Take an address range without memory. Raises ConfigError."""
        self._table.require_aligned("range", length_bytes)
        address = self._libc.mmap(None, length_bytes, PROT_NONE, MAP_EMPTY, -1, 0)
        if address == MAP_FAILED:
            raise ConfigError(f"cannot reserve {format_bytes(length_bytes)} of addresses: {_last_error()}")
        where = Range(address, length_bytes)
        self._table.add_range(where)
        return where

    def unreserve(self, where: Range) -> None:
        """Give the addresses back."""
        self._table.drop_range(where)
        self._check(self._libc.munmap(where.address, where.length_bytes), "munmap")

    @property
    def live_mappings(self) -> int:
        """Areas of this process's address space that our ranges take: neighbours in the file and in a range are one."""
        return self._table.pieces

    @property
    def max_mappings(self) -> int:
        """What the kernel gives one process, less what everything else in it may need."""
        return self._max_mappings

    def create(self, length_bytes: int) -> Chunk:
        """Allocate physical memory. Raises OutOfChunks."""
        return self.create_run(length_bytes, 1)[0]

    def create_run(self, length_bytes: int, n_chunks: int) -> list[Chunk]:
        """Allocate physical memory, neighbours in one call. Raises OutOfChunks."""
        self._table.require_aligned("chunk", length_bytes)
        holes = self._holes.setdefault(length_bytes, [])
        reused = min(n_chunks, len(holes))
        end_bytes = self._end_bytes + (n_chunks - reused) * length_bytes
        if end_bytes > self._capacity_bytes:
            used, asked_bytes = format_bytes(self._end_bytes), n_chunks * length_bytes
            raise OutOfChunks(
                f"{used} of {format_bytes(self._capacity_bytes)} used; {asked_bytes} bytes more asked for"
            )
        offsets = [*heapq.nsmallest(reused, holes), *range(self._end_bytes, end_bytes, length_bytes)]
        chunks = [Chunk(offset_bytes, length_bytes) for offset_bytes in offsets]
        self._allocate(chunks)
        for _ in range(reused):
            heapq.heappop(holes)
        self._end_bytes = end_bytes
        for chunk in chunks:
            self._table.add_chunk(chunk)
        return chunks

    def _allocate(self, chunks: Sequence[Chunk]) -> None:
        """All of them or none. Raises OutOfChunks."""
        done: list[tuple[int, int]] = []
        try:
            for offset_bytes, length_bytes in stretches(chunks):
                done.append((offset_bytes, length_bytes))
                os.posix_fallocate(self._fd, offset_bytes, length_bytes)
        except OSError as error:
            for offset_bytes, length_bytes in done:
                self.discard(offset_bytes, length_bytes)
            if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                raise
            raise OutOfChunks(f"the system has no {done[-1][1]} bytes of memory left: {error}") from error

    def release(self, chunk: Chunk) -> None:
        """Give physical memory back to the system."""
        if chunk not in self._vacated:
            self.vacate(chunk)
        self._vacated.discard(chunk)
        heapq.heappush(self._holes.setdefault(chunk.length_bytes, []), chunk.offset_bytes)

    def vacate(self, chunk: Chunk) -> None:
        """Give the memory of a chunk back to the system, but keep its place in the file for `refill`.

        It cannot be mapped until then. Raises VmMisuse while it is mapped.
        """
        self._table.drop_chunk(chunk)
        self.discard(chunk.offset_bytes, chunk.length_bytes)
        self._vacated.add(chunk)

    def refill(self, chunk: Chunk) -> None:
        """A vacated chunk has memory again, of zeros. Raises OutOfChunks if the system has none."""
        if chunk not in self._vacated:
            raise VmMisuse(f"{chunk} was not vacated")
        self._allocate([chunk])
        self._vacated.remove(chunk)
        self._table.add_chunk(chunk)

    def discard(self, offset_bytes: int, length_bytes: int) -> None:
        """Give back the memory of a stretch of the file; it reads as zeros afterwards."""
        self._check(self._libc.fallocate(self._fd, _PUNCH_HOLE_KEEP_SIZE, offset_bytes, length_bytes), "fallocate")

    def map_run(self, where: Range, offset_bytes: int, chunks: Sequence[Chunk]) -> None:
        """Make the chunks readable and writable there; neighbours in the file by one call."""
        self._table.add_run(where, offset_bytes, chunks)
        at_bytes = offset_bytes
        for file_bytes, length_bytes in stretches(chunks):
            try:
                self._map_fixed(where.address + at_bytes, length_bytes, _READ_WRITE, mmap.MAP_SHARED, file_bytes)
            except OSError as error:
                self._table.remove_run(where, offset_bytes, len(chunks))
                # If not even that can be: nobody uses what stays, and the next mapping replaces it.
                with contextlib.suppress(OSError), self.undoing():
                    self._empty(where.address + offset_bytes, at_bytes - offset_bytes)
                live = self._table.pieces
                raise OutOfChunks(f"{live} mappings are live and the system has no more: {error}") from error
            at_bytes += length_bytes

    def unmap_run(self, where: Range, offset_bytes: int, n_chunks: int) -> list[Chunk]:
        """Undo the mappings of a run; the addresses stay reserved.

        A run out of the middle of an area divides it, for which the kernel may have no mapping left: OutOfChunks.
        """
        chunks = self._table.run(where, offset_bytes, n_chunks)
        try:
            self._empty(where.address + offset_bytes, sum(chunk.length_bytes for chunk in chunks))
        except OSError as error:
            live = self._table.pieces
            raise OutOfChunks(f"{live} mappings are live and the system cannot divide one: {error}") from error
        return self._table.remove_run(where, offset_bytes, n_chunks)

    def keep_for_undoing(self, n_mappings: int) -> None:
        """Hold so many areas of addresses, and some for other threads of the process. Raises OutOfChunks."""
        self._reserve.keep(n_mappings)

    @contextlib.contextmanager
    def undoing(self) -> Iterator[None]:
        """What is held is given up first, whatever else took meanwhile: the next order holds it anew, or does not begin."""
        self._reserve.give_up()
        yield

    def _empty(self, address: int, length_bytes: int) -> None:
        if length_bytes:
            self._map_fixed(address, length_bytes, PROT_NONE, MAP_EMPTY, None)

    def _map_fixed(self, address: int, length_bytes: int, access: int, kind: int, file_bytes: int | None) -> None:
        fd = -1 if file_bytes is None else self._fd
        found = self._libc.mmap(address, length_bytes, access, kind | _MAP_FIXED, fd, file_bytes or 0)
        if found != address:
            raise OSError(ctypes.get_errno(), f"mmap of {length_bytes} bytes: {_last_error()}")

    def export_fds(self, chunks: Sequence[Chunk] = ()) -> list[int]:
        """One new descriptor of the memfd, whatever the chunks; the caller closes it."""
        del chunks
        return [os.dup(self._fd)]

    def bytes_at(self, where: Range, n_bytes: int) -> "torch.Tensor":
        """The beginning of a range, not copied."""
        import torch  # here: a KV store has this memory too, and no torch

        if n_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer((ctypes.c_ubyte * n_bytes).from_address(where.address), dtype=torch.uint8)

    def close(self) -> None:
        """Unmap every range and close the file; memory goes once no peer maps it."""
        if self._fd < 0:
            return
        for where in self._table.ranges:
            self._check(self._libc.munmap(where.address, where.length_bytes), "munmap")
        self._reserve.give_up()
        os.close(self._fd)
        self._fd = -1

    def _check(self, result: int, call: str) -> None:
        if result != 0:
            raise VmMisuse(f"{call} failed: {_last_error()}")


def _kernel_mappings() -> int:
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except OSError:
        return _KERNEL_MAPPINGS


def _last_error() -> str:
    return os.strerror(ctypes.get_errno())


def _load_libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    return libc
