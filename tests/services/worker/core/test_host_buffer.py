"""Laws of the host buffer: what enters stays until it leaves, and its logical size only bars entries."""

import pytest

from common.errors import OutOfPages
from common.ids import Owner
from services.worker.core.host_buffer import HostBuffer

A, B = Owner("a"), Owner("b")


def test_what_is_kept_stays_when_the_logical_size_falls_below_it_and_nothing_enters() -> None:
    buffer = HostBuffer(20, 2)
    pages = buffer.alloc(A, 6)
    buffer.logical_pages = 8
    assert buffer.used_pages == 12 and pages.shape == (6, 2)
    assert not buffer.admits(1)
    buffer.free(A)
    assert buffer.admits(8) and not buffer.admits(9)
    buffer.check()


def test_pages_of_two_owners_are_never_the_same() -> None:
    buffer = HostBuffer(20, 2)
    both = [*buffer.alloc(A, 4).ravel().tolist(), *buffer.alloc(B, 6).ravel().tolist()]
    assert sorted(both) == list(range(20))


def test_more_than_there_is_memory_for_is_refused_whole() -> None:
    buffer = HostBuffer(6, 2)
    buffer.alloc(A, 2)
    with pytest.raises(OutOfPages):
        buffer.alloc(B, 2)
    assert buffer.used_pages == 4 and buffer.owners == [A]


def test_a_logical_size_beyond_the_memory_is_no_size() -> None:
    with pytest.raises(ValueError, match="must be 0 to 6"):
        HostBuffer(6, 2).logical_pages = 7


def test_without_memory_nothing_is_admitted() -> None:
    assert not HostBuffer(0, 2).admits(2)
