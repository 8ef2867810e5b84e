"""What only real memory can show."""

import ctypes
import errno
import mmap
import os
import random
from pathlib import Path

import pytest

from common.errors import OutOfChunks
from kvstore.memory.backend import Chunk, Range
from kvstore.memory.chunks import ChunkPool
from kvstore.memory.memfd import MemfdBackend
from kvstore.memory.vtensor import VirtualTensor

UNIT = mmap.PAGESIZE


def test_memory_really_goes_back_when_a_chunk_is_released() -> None:
    backend = MemfdBackend(64 * UNIT)
    chunks = [backend.create(16 * UNIT) for _ in range(4)]
    assert backend.resident_bytes == 64 * UNIT
    backend.release(chunks[1])
    backend.release(chunks[2])
    assert backend.resident_bytes == 32 * UNIT
    backend.close()


def test_a_reused_chunk_reads_as_zeros() -> None:
    backend = MemfdBackend(UNIT)
    where, chunk = backend.reserve(UNIT), backend.create(UNIT)
    backend.map_run(where, 0, [chunk])
    ctypes.memset(where.address, 7, UNIT)
    backend.release(*backend.unmap_run(where, 0, 1))
    backend.map_run(where, 0, [backend.create(UNIT)])
    assert ctypes.string_at(where.address, UNIT) == bytes(UNIT)
    backend.close()


def test_a_run_that_the_system_cannot_map_leaves_nothing_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = MemfdBackend(4 * UNIT)
    where, chunks = backend.reserve(4 * UNIT), [backend.create(UNIT) for _ in range(3)]
    map_one, places = backend._map_fixed, list[int]()

    def map_two(address: int, *rest: object) -> None:
        places.append(address)
        if len(places) == 3:
            raise OSError("no more mappings")
        map_one(address, *rest)

    monkeypatch.setattr(backend, "_map_fixed", map_two)
    with pytest.raises(OutOfChunks, match="no more mappings"):
        backend.map_run(where, 0, chunks[::-1])
    assert places[3:] == [where.address]  # emptied as one piece
    backend.map_run(where, 0, chunks[::-1])
    backend.close()


def test_neighbours_in_the_file_are_mapped_by_one_call_and_are_one_area(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = MemfdBackend(8 * UNIT)
    where, chunks = backend.reserve(8 * UNIT), backend.create_run(UNIT, 6)
    map_one, calls = backend._map_fixed, list[int]()

    def counted(address: int, length_bytes: int, *rest: int) -> None:
        calls.append(length_bytes // UNIT)
        map_one(address, length_bytes, *rest)

    monkeypatch.setattr(backend, "_map_fixed", counted)
    before = backend.live_mappings
    backend.map_run(where, 0, [*chunks[2:5], chunks[0], chunks[5]])
    assert calls == [3, 1, 1]
    assert backend.live_mappings - before == 3
    backend.unmap_run(where, UNIT, 1)
    assert backend.live_mappings - before == 5
    backend.map_run(where, UNIT, [chunks[3]])
    assert backend.live_mappings - before == 3
    backend.close()


def test_a_run_that_the_system_cannot_unmap_stays_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = MemfdBackend(4 * UNIT)
    where, chunks = backend.reserve(4 * UNIT), backend.create_run(UNIT, 3)
    backend.map_run(where, 0, chunks)
    with monkeypatch.context() as patched:
        patched.setattr(backend, "_map_fixed", _no_mappings)
        with pytest.raises(OutOfChunks, match="cannot divide one"):
            backend.unmap_run(where, UNIT, 1)
    ctypes.memset(where.address, 7, 3 * UNIT)
    assert backend.unmap_run(where, UNIT, 1) == [chunks[1]]
    backend.close()


def test_chunks_that_cannot_all_be_lifted_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = MemfdBackend(8 * UNIT)
    tensor = VirtualTensor(ChunkPool(backend, 8 * UNIT, UNIT), 8 * UNIT, owner="kv")
    tensor.grow(8)
    before, unmap = backend.live_mappings, backend.unmap_run
    calls = list[int]()

    def first_only(where: Range, offset_bytes: int, n_chunks: int) -> list[Chunk]:
        calls.append(offset_bytes // UNIT)
        if len(calls) == 2:
            raise OutOfChunks("no mappings")
        return unmap(where, offset_bytes, n_chunks)

    with monkeypatch.context() as patched:
        patched.setattr(backend, "unmap_run", first_only)
        with pytest.raises(OutOfChunks):
            tensor.lift([5, 2])
    assert (calls, backend.live_mappings) == ([2, 5], before)
    ctypes.memset(tensor.address, 7, 8 * UNIT)
    tensor.release()
    backend.close()


def _no_mappings(*_: object) -> None:
    raise OSError(errno.ENOMEM, "no mappings")


def test_areas_are_those_that_the_kernel_lists() -> None:
    rng, backend = random.Random(0), MemfdBackend(16 * UNIT)
    where, chunks = backend.reserve(32 * UNIT), backend.create_run(UNIT, 16)
    places: dict[int, Chunk] = {}
    for turn in range(300):
        at = rng.randrange(32)
        if at in places:
            backend.unmap_run(where, at * UNIT, 1)
            del places[at]
        else:
            places[at] = chunks[at % 16 if rng.random() < 0.7 else rng.randrange(16)]
            backend.map_run(where, at * UNIT, [places[at]])
        if turn % 20 == 0:
            assert 0 <= backend.live_mappings - listed_areas(where.address, where.length_bytes) <= 1
    backend.close()


def listed_areas(address: int, length_bytes: int) -> int:
    """Areas of this process that lie in a stretch of its addresses, as the kernel has them."""
    spans = [line.split(maxsplit=1)[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    return sum(int(begin, 16) < address + length_bytes and int(end, 16) > address for begin, end in spans)


def test_chunks_that_are_created_together_are_allocated_by_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate, calls = os.posix_fallocate, list[int]()
    monkeypatch.setattr(
        os, "posix_fallocate", lambda fd, offset, length: (calls.append(length), allocate(fd, offset, length))
    )
    backend = MemfdBackend(64 * UNIT)
    chunks = backend.create_run(UNIT, 40)
    backend.release(chunks[3])
    backend.create_run(UNIT, 10)
    assert [length // UNIT for length in calls] == [40, 1, 9]
    assert backend.resident_bytes == 49 * UNIT
    backend.close()


def test_chunks_that_the_system_cannot_all_give_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = MemfdBackend(64 * UNIT)
    backend.release(backend.create_run(UNIT, 4)[1])
    allocate = os.posix_fallocate

    def allocate_holes(fd: int, offset: int, length: int) -> None:
        if offset >= 4 * UNIT:
            raise OSError(errno.ENOSPC, "no memory")
        allocate(fd, offset, length)

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", allocate_holes)
        with pytest.raises(OutOfChunks, match="no 8192 bytes of memory left"):
            backend.create_run(UNIT, 3)
    assert backend.resident_bytes == 3 * UNIT
    assert [chunk.offset_bytes // UNIT for chunk in backend.create_run(UNIT, 3)] == [1, 4, 5]
    backend.close()


def test_scratch_takes_no_memory_until_it_is_written() -> None:
    backend = MemfdBackend(UNIT, scratch_bytes=8 * UNIT)
    assert backend.resident_bytes == 0
    with mmap.mmap(backend.fd, 9 * UNIT) as seen_by_peer:
        seen_by_peer[UNIT : UNIT + 4] = b"tide"
        assert os.pread(backend.fd, 4, UNIT) == b"tide"
    assert backend.resident_bytes == UNIT
    backend.discard(UNIT, UNIT)
    assert backend.resident_bytes == 0
    backend.close()


def test_no_holder_of_the_descriptor_can_cut_the_file_short() -> None:
    backend = MemfdBackend(2 * UNIT)
    with pytest.raises(PermissionError):
        os.ftruncate(backend.fd, UNIT)
    backend.close()


def test_closing_leaves_no_descriptor_open() -> None:
    backend = MemfdBackend(UNIT)
    fd = backend.fd
    backend.map_run(backend.reserve(UNIT), 0, [backend.create(UNIT)])
    backend.close()
    with pytest.raises(OSError):
        os.fstat(fd)
    backend.close()
