"""Laws that every kind of memory follows."""

from collections.abc import Callable, Iterator

import pytest

from common.errors import OutOfChunks
from kvstore.memory.backend import VmBackend, VmMisuse
from kvstore.memory.fake import FakeBackend
from kvstore.memory.memfd import MemfdBackend

UNIT = 4096


@pytest.fixture(params=[FakeBackend, MemfdBackend])
def backend(request: pytest.FixtureRequest) -> Iterator[VmBackend]:
    make: Callable[[int], VmBackend] = request.param
    opened = make(8 * UNIT)
    yield opened
    opened.close()


def test_a_mapped_chunk_cannot_be_released(backend: VmBackend) -> None:
    where, chunk = backend.reserve(4 * UNIT), backend.create(UNIT)
    backend.map(where, 0, chunk)
    with pytest.raises(VmMisuse, match="still mapped"):
        backend.release(chunk)
    assert backend.unmap(where, 0) == chunk
    backend.release(chunk)


def test_a_chunk_mapped_twice_needs_two_unmaps(backend: VmBackend) -> None:
    where, chunk = backend.reserve(4 * UNIT), backend.create(UNIT)
    backend.map(where, 0, chunk)
    backend.map(where, 2 * UNIT, chunk)
    backend.unmap(where, 0)
    with pytest.raises(VmMisuse, match="still mapped"):
        backend.release(chunk)


def test_a_range_with_chunks_cannot_be_given_back(backend: VmBackend) -> None:
    where = backend.reserve(4 * UNIT)
    backend.map(where, UNIT, backend.create(UNIT))
    with pytest.raises(VmMisuse, match="still has 1 chunks"):
        backend.unreserve(where)


@pytest.mark.parametrize("offset", [0, UNIT, 2 * UNIT])
def test_mappings_never_overlap(backend: VmBackend, offset: int) -> None:
    where = backend.reserve(8 * UNIT)
    backend.map(where, 2 * UNIT, backend.create(UNIT))
    backend.map(where, 0, backend.create(UNIT))
    wide = backend.create(3 * UNIT)
    with pytest.raises(VmMisuse, match="overlaps"):
        backend.map(where, offset, wide)
    backend.map(where, 3 * UNIT, wide)


def test_odd_lengths_and_places_are_refused(backend: VmBackend) -> None:
    where, chunk = backend.reserve(2 * UNIT), backend.create(UNIT)
    for call in (
        lambda: backend.create(UNIT + 1),
        lambda: backend.reserve(100),
        lambda: backend.map(where, 7, chunk),
        lambda: backend.map(where, 2 * UNIT, chunk),
        lambda: backend.unmap(where, 0),
    ):
        with pytest.raises(VmMisuse):
            call()


def test_a_chunk_is_released_once(backend: VmBackend) -> None:
    chunk = backend.create(UNIT)
    backend.release(chunk)
    with pytest.raises(VmMisuse, match="released before"):
        backend.release(chunk)


def test_creation_stops_at_the_capacity_and_goes_on_after_a_release(backend: VmBackend) -> None:
    chunks = [backend.create(UNIT) for _ in range(8)]
    with pytest.raises(OutOfChunks):
        backend.create(UNIT)
    backend.release(chunks[3])
    backend.create(UNIT)
    with pytest.raises(OutOfChunks):
        backend.create(UNIT)
