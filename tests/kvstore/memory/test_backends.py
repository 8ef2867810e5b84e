"""Laws that every kind of memory follows."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from common.errors import OutOfChunks
from common.log import Log
from common.net.fault_kit import FaultKit
from kvstore.memory import cuda_driver
from kvstore.memory.backend import VmBackend, VmMisuse
from kvstore.memory.cuda_vmm import CudaVmmBackend, open_cuda
from kvstore.memory.fake import FakeBackend
from kvstore.memory.faulty import faulty_backend
from kvstore.memory.memfd import MemfdBackend
from tests.kvstore.memory.pretended_driver import PretendedCuda

_CAPACITY_UNITS = 8
_HOST_UNIT = 4096


def _pretended(capacity_bytes: int) -> CudaVmmBackend:
    cuda = PretendedCuda(capacity_bytes)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cuda_driver, "_bindings", lambda: cuda)
        return CudaVmmBackend(torch.device("cpu"), cuda_driver.CudaDriver(0))


def _faulty(capacity_bytes: int) -> VmBackend:
    """The fault kit's, with no rule that concerns it."""
    return faulty_backend(MemfdBackend(capacity_bytes), FaultKit("grant:drop", "decode-0", Log()))


def _cuda(capacity_bytes: int) -> CudaVmmBackend:
    del capacity_bytes  # the device's own
    return open_cuda(torch.device("cuda", 0))


@pytest.fixture(params=[FakeBackend, MemfdBackend, _faulty, _pretended, pytest.param(_cuda, marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Iterator[VmBackend]:
    if request.param is _cuda and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    make: Callable[[int], VmBackend] = request.param
    opened = make(_CAPACITY_UNITS * _HOST_UNIT)
    yield opened
    opened.close()


@pytest.fixture
def unit(backend: VmBackend) -> int:
    return backend.granularity_bytes


@pytest.fixture
def touchable(backend: VmBackend) -> VmBackend:
    if isinstance(backend, FakeBackend):
        pytest.skip("counted memory holds nothing")
    return backend


def test_a_mapped_chunk_cannot_be_released(backend: VmBackend, unit: int) -> None:
    where, chunk = backend.reserve(4 * unit), backend.create(unit)
    backend.map_run(where, 0, [chunk])
    with pytest.raises(VmMisuse, match="still mapped"):
        backend.release(chunk)
    assert backend.unmap_run(where, 0, 1) == [chunk]
    backend.release(chunk)


def test_a_chunk_mapped_twice_needs_two_unmaps(backend: VmBackend, unit: int) -> None:
    where, chunk = backend.reserve(4 * unit), backend.create(unit)
    backend.map_run(where, 0, [chunk])
    backend.map_run(where, 2 * unit, [chunk])
    backend.unmap_run(where, 0, 1)
    with pytest.raises(VmMisuse, match="still mapped"):
        backend.release(chunk)


def test_a_chunk_is_kept_while_it_is_mapped_in_any_range(backend: VmBackend, unit: int) -> None:
    home, views, chunks = backend.reserve(4 * unit), backend.reserve(8 * unit), backend.create_run(unit, 4)
    backend.map_run(home, 0, chunks)
    backend.map_run(views, unit, chunks[1:3])
    backend.map_run(views, 4 * unit, [chunks[3], chunks[1]])
    assert backend.unmap_run(home, 0, 4) == chunks
    backend.release(chunks[0])
    for chunk in chunks[1:]:
        with pytest.raises(VmMisuse, match="still mapped"):
            backend.release(chunk)
    assert backend.unmap_run(views, unit, 2) == chunks[1:3]
    with pytest.raises(VmMisuse, match="still mapped 1 times"):
        backend.release(chunks[1])
    backend.release(chunks[2])


def test_mappings_are_counted_wherever_they_are(backend: VmBackend, unit: int) -> None:
    where, chunks = backend.reserve(16 * unit), backend.create_run(unit, 3)
    before = backend.live_mappings
    backend.map_run(where, 0, chunks[::-1])
    backend.map_run(where, 8 * unit, chunks[::-1])
    there = backend.live_mappings - before
    assert 6 <= there <= 7  # a kernel counts the hole between them
    assert there < backend.max_mappings
    backend.unmap_run(where, 8 * unit, 3)
    backend.unmap_run(where, 0, 3)
    assert backend.live_mappings == before


def test_a_run_of_chunks_is_created_whole_or_not_at_all(backend: VmBackend, unit: int) -> None:
    if backend.device.type == "cuda":
        pytest.skip("the device's capacity is not ours to use up")
    first = backend.create_run(unit, 5)
    backend.release(first[2])
    with pytest.raises(OutOfChunks):
        backend.create_run(unit, 5)
    again = backend.create_run(unit, 4)
    assert len({*first[:2], *first[3:], *again}) == 8
    with pytest.raises(OutOfChunks):
        backend.create(unit)


def test_a_range_with_chunks_cannot_be_given_back(backend: VmBackend, unit: int) -> None:
    where = backend.reserve(4 * unit)
    backend.map_run(where, unit, [backend.create(unit)])
    with pytest.raises(VmMisuse, match="still has 1 chunks"):
        backend.unreserve(where)


@pytest.mark.parametrize("offset_units", [0, 1, 2])
def test_mappings_never_overlap(backend: VmBackend, unit: int, offset_units: int) -> None:
    where = backend.reserve(8 * unit)
    backend.map_run(where, 2 * unit, [backend.create(unit)])
    backend.map_run(where, 0, [backend.create(unit)])
    wide = backend.create(3 * unit)
    with pytest.raises(VmMisuse, match="overlaps"):
        backend.map_run(where, offset_units * unit, [wide])
    backend.map_run(where, 3 * unit, [wide])


def test_odd_lengths_and_places_are_refused(backend: VmBackend, unit: int) -> None:
    where, chunk = backend.reserve(2 * unit), backend.create(unit)
    for call in (
        lambda: backend.create(unit + 1),
        lambda: backend.reserve(100),
        lambda: backend.map_run(where, 7, [chunk]),
        lambda: backend.map_run(where, 2 * unit, [chunk]),
        lambda: backend.unmap_run(where, 0, 1),
    ):
        with pytest.raises(VmMisuse):
            call()


def test_a_chunk_is_released_once(backend: VmBackend, unit: int) -> None:
    chunk = backend.create(unit)
    backend.release(chunk)
    with pytest.raises(VmMisuse, match="released before"):
        backend.release(chunk)


def test_creation_stops_at_the_capacity_and_goes_on_after_a_release(backend: VmBackend, unit: int) -> None:
    if backend.device.type == "cuda":
        pytest.skip("the device's capacity is not ours to use up")
    chunks = [backend.create(unit) for _ in range(_CAPACITY_UNITS)]
    with pytest.raises(OutOfChunks):
        backend.create(unit)
    backend.release(chunks[3])
    backend.create(unit)
    with pytest.raises(OutOfChunks):
        backend.create(unit)


def test_a_run_is_mapped_whole_or_not_at_all(backend: VmBackend, unit: int) -> None:
    where, first, second = backend.reserve(4 * unit), backend.create(unit), backend.create(unit)
    backend.map_run(where, 2 * unit, [first])
    with pytest.raises(VmMisuse, match="overlaps"):
        backend.map_run(where, unit, [second, second])
    backend.release(second)
    assert backend.unmap_run(where, 2 * unit, 1) == [first]


def test_a_run_with_a_gap_is_not_unmapped_in_part(backend: VmBackend, unit: int) -> None:
    where, chunks = backend.reserve(4 * unit), [backend.create(unit) for _ in range(3)]
    backend.map_run(where, 0, chunks[:2])
    backend.map_run(where, 3 * unit, chunks[2:])
    with pytest.raises(VmMisuse, match="nothing is mapped"):
        backend.unmap_run(where, 0, 4)
    assert backend.unmap_run(where, 0, 2) == chunks[:2]


def test_a_part_of_a_run_can_be_unmapped(backend: VmBackend, unit: int) -> None:
    where, chunks = backend.reserve(4 * unit), [backend.create(unit) for _ in range(4)]
    backend.map_run(where, 0, chunks)
    assert backend.unmap_run(where, 2 * unit, 2) == chunks[2:]
    backend.map_run(where, 2 * unit, chunks[2:][::-1])
    assert backend.unmap_run(where, 0, 4) == [*chunks[:2], chunks[3], chunks[2]]


def test_scattered_chunks_read_as_one_array(touchable: VmBackend, unit: int) -> None:
    where, chunks = touchable.reserve(4 * unit), [touchable.create(unit) for _ in range(4)]
    touchable.map_run(where, 0, [chunks[2], chunks[0], chunks[3], chunks[1]])
    seen = touchable.bytes_at(where, 4 * unit)
    assert (seen.dtype, seen.shape, seen.device) == (torch.uint8, (4 * unit,), touchable.device)
    seen.view(torch.bfloat16).fill_(1.5)
    assert bool((seen.view(torch.bfloat16) == 1.5).all())


def test_one_chunk_at_two_places_is_one_memory(touchable: VmBackend, unit: int) -> None:
    where, chunk = touchable.reserve(2 * unit), touchable.create(unit)
    touchable.map_run(where, 0, [chunk])
    touchable.map_run(where, unit, [chunk])
    seen = touchable.bytes_at(where, 2 * unit).view(2, unit)
    seen[0].fill_(0)
    seen[0, 5] = 77
    assert int(seen[1, 5]) == 77


def test_an_alias_is_seen_both_ways_and_in_runs(touchable: VmBackend, unit: int) -> None:
    home, view = touchable.reserve(4 * unit), touchable.reserve(4 * unit)
    chunks = touchable.create_run(unit, 4)
    touchable.map_run(home, 0, chunks)
    touchable.map_run(view, 0, [chunks[1], chunks[2], chunks[0], chunks[3]])
    at_home, in_view = (touchable.bytes_at(where, 4 * unit).view(4, unit) for where in (home, view))
    for number in range(4):
        at_home[number].fill_(number)
    assert [int(row.max()) for row in in_view] == [1, 2, 0, 3]
    in_view[2].fill_(9)
    assert int(at_home[0].min()) == 9
    touchable.unmap_run(view, 1 * unit, 2)
    assert [int(row[0]) for row in at_home] == [9, 1, 2, 3]


def test_a_view_over_a_part_without_memory_shows_it_once_it_is_mapped(touchable: VmBackend, unit: int) -> None:
    where = touchable.reserve(4 * unit)
    seen = touchable.bytes_at(where, 4 * unit).view(4, unit)
    touchable.map_run(where, unit, [touchable.create(unit)])
    seen[1].fill_(9)
    assert int(seen[1].max()) == 9


def test_a_chunk_keeps_its_bytes_while_it_is_not_mapped(touchable: VmBackend, unit: int) -> None:
    where, chunk = touchable.reserve(2 * unit), touchable.create(unit)
    seen = touchable.bytes_at(where, 2 * unit).view(2, unit)
    touchable.map_run(where, 0, [chunk])
    seen[0].fill_(5)
    touchable.map_run(where, unit, touchable.unmap_run(where, 0, 1))
    assert bool((seen[1] == 5).all())


def test_exported_descriptors_are_the_callers(touchable: VmBackend, unit: int) -> None:
    chunks = [touchable.create(unit) for _ in range(3)]
    for _ in range(2):
        fds = touchable.export_fds(chunks)
        assert len(fds) in (1, 3)
        for fd in fds:
            os.close(fd)


def test_closing_again_changes_nothing(backend: VmBackend, unit: int) -> None:
    backend.map_run(backend.reserve(unit), 0, [backend.create(unit)])
    backend.close()
    backend.close()
