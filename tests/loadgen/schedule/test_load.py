import itertools
from collections import Counter

import pytest

from common.errors import ConfigError
from loadgen.schedule.curves import Steady
from loadgen.schedule.load import Load, planned, share_of, shared_out
from loadgen.workload.plan import Conversation
from tests.loadgen.plans import Listed, Talks, talk, turn


def plan(load: Load, workload: object = Talks(), seed: int = 0, starts_s: object = None) -> list[Conversation]:
    return list(planned(workload, load, seed, starts_s).conversations)  # type: ignore[arg-type] # any workload


def gap_s(load: Load) -> float | None:
    return planned(Talks(), load, 0).gap_s


def turns_of(conversations: list[Conversation]) -> int:
    return sum(len(conversation.turns) for conversation in conversations)


def test_an_open_loop_starts_conversations_at_its_arrivals_and_leaves_later_turns_to_the_answers() -> None:
    found = plan(Load(curve=Steady(2.0), arrival="constant", n_requests=6), Talks(turns=3))
    assert [conversation.turns[0].at_s for conversation in found] == [0.0, 0.5]
    assert {later.at_s for conversation in found for later in conversation.turns[1:]} == {None}


def test_the_number_of_requests_counts_turns_and_cuts_the_last_conversation() -> None:
    for load in (Load(curve=Steady(1.0), n_requests=7), Load(concurrency=2, n_requests=7)):
        found = plan(load, Talks(turns=3))
        assert [len(conversation.turns) for conversation in found] == [3, 3, 1]


def test_two_hundred_requests_are_sent_unless_something_else_ends_the_run() -> None:
    assert turns_of(plan(Load(curve=Steady(1.0)), Talks(turns=3))) == 200
    assert turns_of(plan(Load(concurrency=1), Talks(n_conversations=5))) == 5
    assert (
        len(list(itertools.islice(planned(Talks(), Load(concurrency=1, duration_s=1.0), 0).conversations, 500))) == 500
    )


def test_a_duration_ends_the_arrivals() -> None:
    found = plan(Load(curve=Steady(10.0), arrival="constant", duration_s=1.0))
    assert [conversation.turns[0].at_s for conversation in found] == [step / 10 for step in range(10)]


def test_turns_by_arrivals_each_have_a_time_and_keep_their_order() -> None:
    load = Load(curve=Steady(2.0), arrival="constant", turns_by="arrivals", live=4, n_requests=60)
    found = plan(load, Talks(turns=5))
    times = [each.at_s for conversation in found for each in conversation.turns]
    assert sorted(times) == [step / 2 for step in range(60)]  # type: ignore[type-var]
    for conversation in found:
        own = [each.at_s for each in conversation.turns]
        assert own == sorted(own)  # type: ignore[type-var]
    running: Counter[float] = Counter()
    for conversation in found:
        for step in range(60):
            if conversation.turns[0].at_s <= step / 2 <= conversation.turns[-1].at_s:  # type: ignore[operator]
                running[step / 2] += 1
    assert max(running.values()) <= 4 < len(found)


TRACE = Listed((talk(0, (turn(at_s=5.0),)), talk(1, (turn(at_s=1.0),)), talk(2, (turn(at_s=3.0),))))
STARTS_S = (5.0, 1.0, 3.0)


def test_a_replay_sends_at_the_times_of_the_trace_in_their_order() -> None:
    assert [one.index for one in plan(Load(replay=True), TRACE, 0, STARTS_S)] == [1, 2, 0]
    assert planned(TRACE, Load(replay=True), 0, STARTS_S).gap_s == 2.0


def test_a_replay_may_end_sooner_than_its_trace() -> None:
    assert [one.index for one in plan(Load(replay=True, duration_s=3.5), TRACE, 0, STARTS_S)] == [1, 2]
    assert [one.index for one in plan(Load(replay=True, n_requests=1), TRACE, 0, STARTS_S)] == [1]


def test_a_trace_that_is_not_replayed_loses_its_times() -> None:
    closed = plan(Load(concurrency=1), TRACE, 0, STARTS_S)
    assert [one.turns[0].at_s for one in closed] == [None] * 3
    open_ = plan(Load(curve=Steady(2.0), arrival="constant"), TRACE, 0, STARTS_S)
    assert [one.turns[0].at_s for one in open_] == [0.0, 0.5, 1.0]


def test_conversations_are_made_when_they_are_asked_for() -> None:
    class Counting(Talks):
        made = 0

        def conversation(self, index: int) -> Conversation:
            Counting.made += 1
            return super().conversation(index)

    planned(Counting(), Load(curve=Steady(1.0), n_requests=1000), 0)
    assert Counting.made == 1


def test_a_replay_needs_times() -> None:
    for workload in (Talks(), Talks(n_conversations=3)):  # an endless one must not be searched for them
        with pytest.raises(ConfigError, match="--replay needs a trace with times"):
            plan(Load(replay=True), workload)


def test_a_plan_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing would be sent"):
        plan(Load(concurrency=1), Listed(()))
    with pytest.raises(ConfigError, match="give --num-requests"):
        plan(Load(curve=Steady(float("inf")), duration_s=1.0))


def test_equal_seeds_give_equal_plans_and_others_do_not() -> None:
    load = Load(curve=Steady(2.0), turns_by="arrivals", n_requests=20)
    assert plan(load, Talks(3), seed=1) == plan(load, Talks(3), seed=1) != plan(load, Talks(3), seed=2)


@pytest.mark.parametrize("places", [None, 3, 4, 7])
def test_processes_share_a_plan_without_loss_or_overlap(places: int | None) -> None:
    whole = plan(Load(curve=Steady(1.0), n_requests=20))
    parts = [list(shared_out(whole, part, 3, places)) for part in range(3)]
    assert sorted((each for part in parts for each in part), key=lambda each: each.index) == whole


def test_conversations_are_dealt_as_places_are() -> None:
    whole = plan(Load(concurrency=4, n_requests=400))
    assert [share_of(4, part, 3) for part in range(3)] == [2, 1, 1]
    assert [len(list(shared_out(whole, part, 3, 4))) for part in range(3)] == [200, 100, 100]
    assert share_of(None, 0, 3) is None


def test_the_gap_is_that_between_arrivals() -> None:
    assert gap_s(Load(curve=Steady(4.0), arrival="constant", n_requests=5)) == 0.25
    assert gap_s(Load(curve=Steady(float("inf")), n_requests=5)) is None
    assert gap_s(Load(concurrency=2, n_requests=5)) == 0.0


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "exactly one"),
        ({"curve": Steady(1.0), "concurrency": 1}, "exactly one"),
        ({"concurrency": 1, "arrival": "gamma"}, "needs --rate"),
        ({"concurrency": 1, "turns_by": "arrivals"}, "needs --rate"),
        ({"concurrency": 1, "max_concurrency": 2}, "closed one already"),
        ({"curve": Steady(1.0), "burstiness": 2.0}, "--arrival gamma"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Load(**fields)  # type: ignore[arg-type] # any field
