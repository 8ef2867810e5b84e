"""When a process that died comes back, and when nobody tries any more."""

from hypothesis import given
from hypothesis import strategies as st

from services.launcher.restarts import GiveUp, RestartAt, RestartPolicy


def test_each_wait_is_twice_the_one_before() -> None:
    policy = RestartPolicy(limit=5, window_s=60)
    waits = []
    for _ in range(5):
        decision = policy.on_death(100.0)
        assert isinstance(decision, RestartAt)
        waits.append(round(decision.at_s - 100.0, 3))
    assert waits == [0.2, 0.4, 0.8, 1.6, 3.2]


def test_one_death_too_many_within_the_window_ends_it() -> None:
    policy = RestartPolicy(limit=2, window_s=60)
    assert isinstance(policy.on_death(0.0), RestartAt)
    assert isinstance(policy.on_death(59.0), RestartAt)
    assert policy.on_death(59.9) == GiveUp("died 3 times within 60 s")


def test_deaths_older_than_the_window_are_forgiven() -> None:
    policy = RestartPolicy(limit=2, window_s=60)
    policy.on_death(0.0)
    policy.on_death(1.0)
    assert policy.on_death(61.0) == RestartAt(61.2, 1)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50), st.integers(1, 5))
def test_a_restart_is_never_promised_for_the_past_nor_beyond_the_limit(gaps_s: list[float], limit: int) -> None:
    policy, now_s = RestartPolicy(limit=limit), 0.0
    for gap_s in gaps_s:
        now_s += gap_s
        match policy.on_death(now_s):
            case RestartAt(at_s, attempt):
                assert now_s < at_s <= now_s + 5.0
                assert 1 <= attempt <= limit
            case GiveUp():
                break


def test_who_ends_for_a_setting_is_tried_ever_more_slowly_and_never_given_up() -> None:
    policy = RestartPolicy(limit=2)
    assert [policy.on_setting(0.0).at_s for _ in range(6)] == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]
    assert [policy.on_setting(0.0).at_s for _ in range(2000)][-1] == 60.0


def test_ends_for_a_setting_are_no_deaths_and_a_death_begins_their_count_again() -> None:
    policy = RestartPolicy(limit=1)
    for _ in range(5):
        policy.on_setting(0.0)
    assert policy.on_death(0.0) == RestartAt(0.2, 1)
    assert policy.on_setting(0.0) == RestartAt(5.0, 1)
