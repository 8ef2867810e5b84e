"""Laws of planning views: who gets which slot, what must be mapped for it, and what steps protect."""

import numpy as np
import pytest
from numpy.typing import NDArray

from kvstore.memory.backend import VmMisuse
from kvstore.memory.view_fences import StepFences
from kvstore.memory.view_slots import Run, ViewSlots, first_pages


def slots(n_slots: int = 4) -> ViewSlots:
    return ViewSlots(n_slots, layers=2, context_blocks=8)


def ids(*blocks: int) -> NDArray[np.int32]:
    return np.array([blocks, [block + 100 for block in blocks]], np.int32)


def show(planned: ViewSlots, owner: str, pages: NDArray[np.int32]) -> int | None:
    """As the mapper does it, without memory, in a step of its own."""
    planned.begin([owner])
    slot = planned.choose(owner, pages)
    if slot is None:
        planned.fences.end()
        return None
    planned.take(slot, owner, pages.shape[1])
    change = planned.change(slot, pages)
    for run in change.unmap:
        planned.note_unmapped(run)
    for run in change.map:
        planned.note_mapped(run)
    planned.fences.shown(slot, owner, pages.shape[1])
    planned.check()
    planned.fences.end()
    return slot


def steps(planned: ViewSlots, *owners: str, times: int = 1) -> None:
    for _ in range(times):
        planned.begin(owners)
        planned.fences.end()


def test_only_what_differs_changes_in_runs_within_a_layer() -> None:
    planned = slots()
    slot = show(planned, "a", ids(1, 2, 3, 4))
    assert slot is not None
    change = planned.change(slot, ids(1, 7, 8, 4, 9))
    assert change.unmap == (Run(slot, 0, 1, (2, 3)), Run(slot, 1, 1, (102, 103)))
    assert [run.pages for run in change.map] == [(7, 8), (9,), (107, 108), (109,)]
    assert change.new_pages == 6


def test_the_longest_run_of_the_same_leading_pages_wins_whatever_else_a_slot_shows() -> None:
    planned = slots()
    for owner, blocks in {"a": (1, 2, 3), "b": (1, 2, 5, 6, 7), "c": (9, 2, 3)}.items():
        show(planned, owner, ids(*blocks))
    steps(planned, "other", times=5)
    assert show(planned, "next", ids(1, 2, 5, 8)) == 1


def test_without_common_pages_a_slot_with_nothing_in_the_way_wins_then_the_oldest() -> None:
    planned = slots(3)
    show(planned, "a", ids(1, 2))
    show(planned, "b", ids(3))
    steps(planned, "other", times=5)
    assert show(planned, "c", ids(5, 6)) == 2
    steps(planned, "c", times=5)
    show(planned, "b", ids(3))
    steps(planned, "other", times=5)
    assert planned.choose("d", ids(11, 12)) == 1  # one block in the way, not two


def test_running_sequences_keep_their_slots_while_there_are_ended_ones() -> None:
    planned = slots(3)
    for number, owner in enumerate("abc"):
        show(planned, owner, ids(10 * number))
    steps(planned, "a", "b", "c")
    steps(planned, "a", "c", times=4)
    assert planned.choose("d", ids(0, 1)) == 1  # though the slot of a begins with the same page
    assert planned.choose("d", ids(0, 1), idle_only=True) == 1


def test_who_waits_longest_of_the_running_is_replaced_when_none_has_ended() -> None:
    planned = slots(2)
    show(planned, "a", ids(1))
    show(planned, "b", ids(2))
    steps(planned, "a", "b")
    assert planned.choose("c", ids(3), idle_only=True) is None
    assert show(planned, "c", ids(3)) == 0


def test_a_slot_that_is_taken_leaves_stale_pages_behind_its_new_owners_blocks() -> None:
    planned = slots(1)
    show(planned, "a", ids(1, 2, 3))
    steps(planned, "x", times=5)
    show(planned, "b", ids(1, 5))
    assert (planned.mapped_pages, planned.stale_pages) == (6, 2)
    assert [run.pages for run in planned.stale()] == [(3,), (103,)]
    for run in list(planned.stale()):
        planned.note_unmapped(run)
    assert (planned.mapped_pages, planned.stale_pages) == (4, 0)
    planned.check()


def test_an_owner_may_show_fewer_blocks_and_keeps_the_others() -> None:
    planned = slots()
    slot = show(planned, "a", ids(1, 2, 3))
    steps(planned, "a")
    assert show(planned, "a", ids(1)) == slot
    assert planned.stale_pages == 0
    assert planned.shows("a", ids(1, 2, 3)) == slot


def test_giving_up_takes_ended_sequences_first_and_nothing_that_is_read() -> None:
    planned = slots()
    for number, owner in enumerate("abcd"):
        show(planned, owner, ids(10 * number, 10 * number + 1))
    steps(planned, "a", "b", "c", "d")
    steps(planned, "a", "c", times=4)
    show(planned, "c", ids(20, 21))
    planned.begin(["c"])
    planned.give_up(1, but=3)
    assert [run.slot for run in planned.stale()] == [1, 1]
    planned.give_up(99, but=3, idle_only=True)
    assert {run.slot for run in planned.stale()} == {1}
    planned.give_up(99, but=3)
    assert {run.slot for run in planned.stale()} == {0, 1}
    planned.check()


def test_mapping_behind_an_owners_blocks_is_our_own_bug() -> None:
    planned = slots()
    planned.take(0, "a", 1)
    with pytest.raises(VmMisuse, match="behind the 1 blocks"):
        planned.note_mapped(Run(0, 0, 1, (5,)))


def test_counts_that_do_not_add_up_are_found() -> None:
    planned = slots()
    show(planned, "a", ids(1, 2))
    planned._pages[2, 0, 0] = 4
    with pytest.raises(VmMisuse, match="slot 2"):
        planned.check()


def test_pages_that_leave_are_looked_for_only_where_something_is_mapped() -> None:
    planned, looked = slots(), list[int]()

    def leaving(pages: NDArray[np.int32]) -> NDArray[np.bool_]:
        looked.append(pages.shape[1])
        gone: NDArray[np.bool_] = pages == 2
        return gone

    show(planned, "a", ids(1, 2, 3))
    show(planned, "b", ids(4))
    (run,) = planned.mapped_where(leaving)
    assert (run.first_block, run.pages, sorted(looked)) == (1, (2,), [1, 3])
    for one in planned.mapped_where(lambda pages: pages >= 3):
        planned.note_unmapped(one)
    planned.check()


def test_a_batch_is_cut_within_a_run() -> None:
    runs = [Run(0, 0, 3, (1, 2)), Run(0, 1, 0, (4, 5, 6)), Run(1, 0, 0, (7,))]
    assert first_pages(runs, 4) == [runs[0], Run(0, 1, 0, (4, 5))]
    assert first_pages(runs, 99) == runs


def test_what_was_shown_is_read_until_its_step_has_ended() -> None:
    fences = StepFences()
    fences.begin(["a", "b"])
    fences.shown(0, "a", 3)
    fences.begin(["a"])
    fences.shown(0, "a", 4)
    assert (fences.read_blocks(0), fences.read_blocks(1)) == (4, 0)
    fences.end()
    assert fences.read_blocks(0) == 4
    fences.end()
    assert fences.read_blocks(0) == 0
    with pytest.raises(VmMisuse, match="did not begin"):
        fences.end()


def test_showing_outside_of_a_step_or_twice_in_one_is_our_own_bug() -> None:
    fences = StepFences()
    with pytest.raises(VmMisuse, match="outside of a step"):
        fences.shown(0, "a", 3)
    fences.begin(["a"])
    fences.shown(0, "a", 3)
    with pytest.raises(VmMisuse, match="a second time"):
        fences.shown(0, "a", 4)


def test_a_step_that_began_awaits_what_it_was_not_shown() -> None:
    fences = StepFences()
    fences.begin(["a", "b"])
    assert fences.awaits("a")
    fences.shown(2, "a", 5)
    assert not fences.awaits("a")
    assert fences.read_blocks(2) == 5
    fences.end()
    assert not fences.awaits("b")
    assert fences.read_blocks(2) == 0
