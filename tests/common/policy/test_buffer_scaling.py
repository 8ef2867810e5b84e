"""The logical size follows the promises that are broken, within its limits, and one step of change at a time."""

import pytest

from common.policy.buffer_scaling import BufferScaling

TTFT, TPOT, BOTH, NONE = (True, False), (False, True), (True, True), (False, False)


def scaling(**changes: float) -> BufferScaling:
    return BufferScaling(**{"least_bytes": 10, "physical_bytes": 1000, **changes})  # type: ignore[arg-type]


def sizes(target: BufferScaling, *steps: tuple[bool, bool]) -> list[int]:
    return [target.after_step(*step) for step in steps]


def test_it_starts_as_large_as_it_is_and_stays_so_while_nothing_is_late() -> None:
    assert sizes(scaling(), *[NONE] * 20) == [1000] * 20


def test_three_late_tokens_in_five_steps_halve_it_two_do_not() -> None:
    assert sizes(scaling(), TPOT, NONE, TPOT, NONE, TPOT) == [1000, 1000, 1000, 1000, 500]
    assert sizes(scaling(), TPOT, TPOT, NONE, NONE, NONE, TPOT, NONE, NONE, TPOT) == [1000] * 9


def test_late_first_tokens_make_it_grow_again_up_to_what_there_is() -> None:
    target = scaling()
    sizes(target, *[TPOT] * 6)
    assert sizes(target, *[TTFT] * 9) == [250, 250, 500, 500, 500, 1000, 1000, 1000, 1000]


def test_late_tokens_outweigh_late_first_tokens() -> None:
    assert sizes(scaling(), BOTH, BOTH, BOTH)[-1] == 500
    assert sizes(scaling(), TTFT, TTFT, BOTH, TPOT, TPOT)[-1] == 500


def test_after_a_change_misses_are_counted_from_none() -> None:
    assert sizes(scaling(), *[TPOT] * 7) == [1000, 1000, 500, 500, 500, 250, 250]


def test_it_shrinks_no_further_than_the_least_and_can_always_grow_back() -> None:
    for alpha in (1.01, 1.5, 2.0, 7.0):
        target = scaling(least_bytes=1, alpha=alpha)
        assert sizes(target, *[TPOT] * 3000)[-1] == 1
        assert sizes(target, *[TTFT] * 3000)[-1] == 1000


def test_how_many_misses_in_how_many_steps_is_a_setting() -> None:
    assert sizes(scaling(misses=1, window_steps=1), TPOT, NONE, TPOT) == [500, 500, 250]
    assert sizes(scaling(misses=2, window_steps=2), TPOT, NONE, TPOT, TPOT) == [1000, 1000, 1000, 500]


@pytest.mark.parametrize(
    "changes",
    [{"least_bytes": 0}, {"least_bytes": 1001}, {"alpha": 1.0}, {"alpha": float("nan")}, {"misses": 0}, {"misses": 6}],
)
def test_numbers_that_cannot_work_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        scaling(**changes)
