"""Laws of who goes first."""

from common.policy.urgency import PRIORITY_MS, rank_ms


def test_the_urgent_go_first_and_nobody_waits_for_ever_behind_them() -> None:
    assert rank_ms(1_000.0, 0) < rank_ms(0.0, 2)
    patient = rank_ms(0.0, 5)
    assert all(rank_ms(later_ms, 0) > patient for later_ms in (5 * PRIORITY_MS + 1, 60_000.0))
