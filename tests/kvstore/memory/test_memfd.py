"""What only real memory can show."""

import ctypes
import mmap
import os

import pytest

from common.errors import OutOfChunks
from kvstore.memory.memfd import MemfdBackend

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
        backend.map_run(where, 0, chunks)
    assert places[3:] == [where.address]  # emptied as one piece
    backend.map_run(where, 0, chunks)
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
