from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from loadgen.workload.popularity import draw_group
from loadgen.workload.shared_prefix import SharedPrefix
from tests.loadgen.workload.made import made, plans


def shared(**options: str) -> SharedPrefix:
    workload = made("shared-prefix", **options)
    assert isinstance(workload, SharedPrefix)
    return workload


def test_requests_of_one_group_begin_alike_and_of_others_do_not() -> None:
    workload = shared(prefix_groups="4", prefix_len="20-60")
    openings: dict[int, set[object]] = {}
    for planned in plans(workload, 60):
        openings.setdefault(workload.group_of(planned.index), set()).add(planned.opening)
    assert len(openings) == 4
    assert all(len(found) == 1 for found in openings.values())
    assert len(set.union(*openings.values())) == 4


def test_a_share_splits_a_whole_prompt_and_longer_ones_share_more() -> None:
    workload = shared(prefix_groups="1", prefix_share="0.75", isl="40-400")
    by_length = sorted(plans(workload, 20), key=lambda planned: len(planned.opening))
    for short, long in pairwise(by_length):
        assert long.opening[: len(short.opening)] == short.opening
        total = len(long.opening) + len(long.turns[0].added)
        assert 40 <= total <= 400
        assert len(long.opening) == pytest.approx(0.75 * total, abs=1)


def test_popularity_follows_zipf() -> None:
    random = Random(0)
    drawn = Counter(draw_group(random, 8, 1.0) for _ in range(20_000))
    for group in range(8):
        assert drawn[0] / drawn[group] == pytest.approx(group + 1, rel=0.15)


def test_without_an_exponent_all_groups_are_alike() -> None:
    random = Random(0)
    drawn = Counter(draw_group(random, 4, 0.0) for _ in range(8000))
    assert max(drawn.values()) / min(drawn.values()) < 1.15


def test_together_sends_siblings_one_after_the_other_from_groups_drawn_anew() -> None:
    workload = shared(prefix_groups="8", group_order="together", siblings="4")
    groups = [workload.group_of(index) for index in range(80)]
    runs = [groups[start : start + 4] for start in range(0, 80, 4)]
    assert all(len(set(run)) == 1 for run in runs)
    assert [run[0] for run in runs] != [place % 8 for place in range(20)]


def test_grouped_visits_all_groups_in_turn() -> None:
    workload = shared(prefix_groups="3", group_order="grouped", siblings="2")
    assert [workload.group_of(index) for index in range(8)] == [0, 0, 1, 1, 2, 2, 0, 0]
