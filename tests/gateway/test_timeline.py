"""Where a request's time went: parts follow one another, and are the whole."""

import math

import pytest

from common.messages.requests import Timings
from gateway.timeline import FIRST_TOKEN_PARTS, Timeline

TOLD = Timings(prefill_queue_ms=1.0, compute_ms=2.0, grant_wait_ms=3.0, transfer_ms=4.0)


def test_the_parts_up_to_the_first_token_are_the_whole_of_it_also_after_a_failed_attempt() -> None:
    timeline = Timeline(100.0)
    timeline.sent(103.0, 104.0)
    timeline.sent(150.0, 152.0)
    timeline.first(TOLD, 170.0)
    timeline.written(171.5)
    parts_ms = timeline.parts_ms()
    assert tuple(parts_ms) == FIRST_TOKEN_PARTS
    assert list(parts_ms.values()) == [3.0, 47.0, 2.0, 1.0, 2.0, 3.0, 4.0, 8.0, 1.5]
    assert sum(parts_ms.values()) == timeline.ttft_ms == 71.5


def test_a_replay_after_the_first_token_changes_no_part_of_it() -> None:
    timeline = Timeline(0.0)
    timeline.sent(1.0, 2.0)
    timeline.first(TOLD, 20.0)
    before = timeline.parts_ms()
    timeline.sent(500.0, 501.0)
    assert timeline.parts_ms() == before and timeline.attempts == 2


@pytest.mark.parametrize(("told", "left"), [(Timings(prefill_queue_ms=5.0), {"wire": 2.0}), (None, {"lost": 7.0})])
def test_without_a_first_token_the_parts_go_up_to_the_end(told: Timings | None, left: dict[str, float]) -> None:
    timeline = Timeline(0.0)
    timeline.sent(1.0, 3.0)
    timeline.ended(10.0, told)
    parts_ms = timeline.parts_ms()
    assert sum(parts_ms.values()) == 10.0 and timeline.ttft_ms is None
    assert {name: parts_ms[name] for name in left} == left


def test_who_was_never_sent_anywhere_spent_its_time_in_the_queue() -> None:
    timeline = Timeline(2.0)
    timeline.ended(9.0)
    assert timeline.parts_ms() == {"queue": 7.0}


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -5.0, 1e300])
def test_what_is_no_duration_is_none_and_counted(wrong: float) -> None:
    timeline = Timeline(0.0)
    timeline.sent(1.0, 2.0)
    timeline.first(Timings(compute_ms=wrong, transfer_ms=3.0), 9.0)
    parts_ms = timeline.parts_ms()
    assert (parts_ms["compute"], parts_ms["transfer"], parts_ms["wire"]) == (0.0, 3.0, 4.0)
    assert timeline.violations == 1
    timeline.second_token(Timings(first_step_ms=wrong))
    assert timeline.second_token_ms() == {"decode_queue": 0.0, "first_step": 0.0} and timeline.violations == 2


def test_parts_that_are_more_than_the_whole_are_said_to_be() -> None:
    timeline = Timeline(0.0)
    timeline.sent(1.0, 2.0)
    timeline.first(Timings(compute_ms=12.0), 9.0)
    assert sum(timeline.parts_ms().values()) - timeline.excess_ms == timeline.ttft_ms == 9.0
    assert timeline.excess_ms == 5.0 and timeline.violations == 1
