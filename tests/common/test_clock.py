"""A clock that is wrong on purpose."""

from common.clock import FaultyClock
from tests.common.net.test_fault_kit import Hand


def test_a_clock_is_ahead_slow_and_jumps_as_it_was_told() -> None:
    inner, jumps = Hand(), [0.0, 0.0, 1000.0, 0.0]
    inner.ms = 50.0
    clock = FaultyClock(inner, jump_ms=lambda: jumps.pop(0), rate=0.5, skew_ms=7.0)
    assert clock.now_ms() == 57.0
    inner.ms = 70.0
    assert clock.now_ms() == 67.0
    assert [clock.now_ms(), clock.now_ms()] == [1067.0, 1067.0]
