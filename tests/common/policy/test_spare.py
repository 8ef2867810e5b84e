"""Laws of memory that goes back to the system: not at once, not all of it, and not to and fro."""

import random

from common.policy.spare import SpareMarks, SpareRule

MARKS = SpareMarks(low_chunks=4, high_chunks=10, hold_ms=100.0)


def test_much_must_be_free_for_a_while_and_then_half_of_it_goes() -> None:
    rule = SpareRule(MARKS)
    assert [rule.change(20, 0, now_ms) for now_ms in (0.0, 50.0, 99.0, 100.0)] == [0, 0, 0, 10]
    assert rule.change(12, 8, 150.0) == 0, "the next half waits as long"
    assert rule.change(12, 8, 200.0) == 6


def test_a_load_that_returns_starts_the_wait_anew() -> None:
    rule = SpareRule(MARKS)
    rule.change(20, 0, 0.0)
    assert rule.change(10, 0, 90.0) == 0
    assert rule.change(20, 0, 110.0) == 0
    assert rule.change(20, 0, 209.0) == 0
    assert rule.change(20, 0, 210.0) == 10


def test_between_the_marks_nothing_moves() -> None:
    rule = SpareRule(MARKS)
    assert {rule.change(free, 5, 1000.0 * free) for free in range(4, 11)} == {0}


def test_memory_is_fetched_before_it_is_missed_and_no_more_than_is_away() -> None:
    rule = SpareRule(MARKS)
    assert rule.change(3, 20, 0.0) == -4, "up to the middle between the marks"
    assert rule.change(0, 2, 0.0) == -2
    assert rule.change(0, 0, 0.0) == 0


def test_no_change_calls_for_its_opposite() -> None:
    rng = random.Random(0)
    for _ in range(200):
        low = rng.randrange(1, 20)
        marks = SpareMarks(low_chunks=low, high_chunks=low + rng.randrange(1, 20), hold_ms=0.0)
        free, away = rng.randrange(80), rng.randrange(80)
        change = SpareRule(marks).change(free, away, 0.0)
        again = SpareRule(marks).change(free - change, away + change, 0.0)
        assert change * again >= 0


def test_marks_of_a_pool_leave_a_gap() -> None:
    for total in (1, 2, 8, 500):
        marks = SpareMarks.of(total)
        assert 0 < marks.low_chunks < marks.high_chunks
