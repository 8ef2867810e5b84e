"""A back end that has no room when a rule says so, and only where it might have none."""

from collections.abc import Sequence

import pytest

from common.errors import OutOfChunks
from common.log import Log
from common.net.fault_kit import FaultKit
from kvstore.memory.fake import FakeBackend
from kvstore.memory.faulty import FaultyBackend

UNIT = 4096


def backend_with(rules: str, slept: list[float] | None = None) -> FaultyBackend:
    sleep = (slept if slept is not None else []).append
    return FaultyBackend(FakeBackend(64 * UNIT), FaultKit(rules, "decode-0", Log()), sleep)


def unmaps(backend: FaultyBackend, mapped: Sequence[int], first: int, n_chunks: int) -> bool:
    where = backend.reserve(16 * UNIT)
    for place in mapped:
        backend.map_run(where, place * UNIT, [backend.create(UNIT)])
    try:
        backend.unmap_run(where, first * UNIT, n_chunks)
    except OutOfChunks:
        return False
    return True


def test_a_call_that_a_rule_names_fails_and_others_do_not() -> None:
    backend = backend_with("memory:fail peer=create after=1 times=1")
    backend.create(UNIT)
    with pytest.raises(OutOfChunks, match="injected failure: create"):
        backend.create_run(UNIT, 2)
    backend.map_run(backend.reserve(UNIT), 0, backend.create_run(UNIT, 1))


def test_a_slow_call_waits_first() -> None:
    slept: list[float] = []
    backend_with("memory:delay ms=5 peer=create", slept).create(UNIT)
    assert slept == [0.005]


@pytest.mark.parametrize(("first", "n_chunks", "there"), [(2, 3, True), (2, 2, False), (3, 2, False), (3, 1, False)])
def test_only_a_part_of_what_is_mapped_cannot_be_unmapped(first: int, n_chunks: int, there: bool) -> None:
    assert unmaps(backend_with("memory:fail peer=unmap"), [2, 3, 4], first, n_chunks) is there


def test_what_undoes_a_failed_order_is_spared_however_many_calls_and_the_next_is_not() -> None:
    backend = backend_with("memory:fail peer=map after=1")
    where = backend.reserve(32 * UNIT)
    chunks = backend.create_run(UNIT, 20)
    backend.map_run(where, 0, chunks)
    for place in range(0, 20, 2):
        backend.unmap_run(where, place * UNIT, 1)
    with pytest.raises(OutOfChunks):
        backend.map_run(where, 20 * UNIT, chunks[:1])
    with backend.undoing():
        for place in range(0, 20, 2):
            backend.map_run(where, place * UNIT, chunks[place : place + 1])
    with pytest.raises(OutOfChunks):
        backend.map_run(where, 20 * UNIT, chunks[:1])


def test_a_call_that_is_the_reverse_of_one_before_is_spared_only_where_something_is_undone() -> None:
    backend = backend_with("memory:fail peer=map after=1")
    where = backend.reserve(4 * UNIT)
    chunks = backend.create_run(UNIT, 1)
    backend.map_run(where, 0, chunks)
    backend.unmap_run(where, 0, 1)
    for _ in range(2):
        with pytest.raises(OutOfChunks):
            backend.map_run(where, 0, chunks)


def test_what_is_undone_within_what_is_undone_ends_no_sparing() -> None:
    backend = backend_with("memory:fail peer=map")
    where = backend.reserve(4 * UNIT)
    with backend.undoing():
        with backend.undoing():
            pass
        backend.map_run(where, 0, backend.create_run(UNIT, 1))
