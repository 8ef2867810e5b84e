"""What must be freed before the next step, and at whose cost."""

import random
from dataclasses import replace

from common.policy.forecast import Victim, shortfall_blocks, victims


def test_with_the_shortfall_freed_just_nothing_is_left_after_the_step() -> None:
    draw = random.Random(6)
    for _ in range(1000):
        available, released, required = (draw.randrange(40) for _ in range(3))
        short = shortfall_blocks(available, released, required)
        left = available + short + released - required
        assert left == 0 if short else left >= 0


def test_who_can_wait_longest_gives_way_first_then_who_frees_most_then_the_youngest() -> None:
    base = Victim(slack_ms=100.0, n_blocks=5, order=1)
    patient, large, young = replace(base, slack_ms=101.0, n_blocks=1), replace(base, n_blocks=6), replace(base, order=2)
    assert victims([base, young, large, patient]) == [3, 2, 1, 0]


def test_everybody_is_in_the_order_once_whoever_they_are() -> None:
    draw = random.Random(7)
    many = [Victim(draw.uniform(-9.0, 9.0), draw.randrange(4), order) for order in range(50)]
    assert sorted(victims(many)) == list(range(50))
    assert victims([]) == []
