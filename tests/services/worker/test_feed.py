"""Laws of the feed: the engine always learns what follows, and never waits for a word that cannot come."""

import random
from collections import deque

import pytest

from services.worker.core.plan import StepPlan
from services.worker.feed import EngineFeed


class Desk:
    """A planner whose plans are as many as the test allows, and an engine that writes down what it is told."""

    def __init__(self) -> None:
        self.may_plan = self.may_follow = True
        self.in_flight: deque[int] = deque()
        self.planned = 0
        self.told: list[str] = []

    def plan(self) -> StepPlan | None:
        return self._next() if self.may_plan and not self.in_flight else None

    def plan_ahead(self) -> StepPlan | None:
        assert len(self.in_flight) == 1
        return self._next() if self.may_follow else None

    def _next(self) -> StepPlan:
        self.planned += 1
        self.in_flight.append(self.planned)
        return StepPlan(self.planned, ())

    def submit(self, plan: StepPlan) -> None:
        self.told.append(f"step {plan.number}")

    def nothing_follows(self) -> None:
        self.told.append("nothing")

    def begin(self) -> None:
        if not self.told or self.told[-1] != "begin":
            self.told.append("begin")

    def words(self) -> list[str]:
        told, self.told = [one for one in self.told if one != "begin"], []
        return told


def end(desk: Desk, feed: EngineFeed) -> None:
    desk.in_flight.popleft()
    feed.ended()
    feed.feed(desk.begin)


def test_while_steps_follow_each_other_two_are_in_flight() -> None:
    desk = Desk()
    feed = EngineFeed(desk, desk, ahead=True)
    assert feed.feed(desk.begin)
    assert desk.words() == ["step 1", "step 2"]
    end(desk, feed)
    assert desk.words() == ["step 3"]


def test_one_at_a_time_the_engine_is_told_each_time_that_nothing_follows() -> None:
    desk = Desk()
    feed = EngineFeed(desk, desk, ahead=False)
    feed.feed(desk.begin)
    end(desk, feed)
    assert desk.words() == ["step 1", "nothing", "step 2", "nothing"]


def test_what_can_follow_only_later_is_submitted_then() -> None:
    desk = Desk()
    feed = EngineFeed(desk, desk, ahead=True)
    desk.may_follow = False
    assert feed.feed(desk.begin)
    assert not feed.feed(desk.begin)
    assert desk.words() == ["step 1", "nothing"]
    desk.may_follow = True
    assert feed.feed(desk.begin)
    assert desk.words() == ["step 2"]


def test_what_a_step_waits_for_begins_before_it_is_submitted() -> None:
    desk = Desk()
    feed = EngineFeed(desk, desk, ahead=True)
    feed.feed(desk.begin)
    assert desk.told == ["begin", "step 1", "begin", "step 2"]


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_after_any_event_the_last_step_is_followed_by_a_word_or_is_not_alone(seed: int, ahead: bool) -> None:
    rng, desk = random.Random(seed), Desk()
    feed, last = EngineFeed(desk, desk, ahead=ahead), ""
    for _ in range(200):
        desk.may_plan, desk.may_follow = rng.random() < 0.5, rng.random() < 0.5
        if desk.in_flight and rng.random() < 0.5:
            end(desk, feed)
        else:
            feed.feed(desk.begin)
        last = (desk.words() or [last])[-1]
        assert len(desk.in_flight) <= (2 if ahead else 1)
        if len(desk.in_flight) == 1:
            assert last == "nothing"
