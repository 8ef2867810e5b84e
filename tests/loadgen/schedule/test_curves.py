import math

import pytest

from loadgen.schedule.curves import (
    ExponentialRamp,
    LinearRamp,
    Pattern,
    RateCurve,
    Steady,
    parse_pattern,
    parse_ramp,
)


def rate_at(curve: RateCurve, requests: float) -> float:
    """Requests per second where so many have been let through."""
    step = 1e-4
    return 2 * step / (curve.time_at_s(requests + step) - curve.time_at_s(requests - step))


@pytest.mark.parametrize("ramp", [LinearRamp(1.0, 9.0, 10.0), LinearRamp(9.0, 1.0, 10.0), LinearRamp(5.0, 5.0, 10.0)])
def test_a_linear_ramp_has_its_rates_at_both_ends_and_keeps_the_second(ramp: LinearRamp) -> None:
    assert ramp.time_at_s(0.0) == 0.0
    assert rate_at(ramp, 0.001) == pytest.approx(ramp.from_per_s, rel=0.01)
    assert ramp.time_at_s(50.0) == pytest.approx(10.0)
    assert rate_at(ramp, 25.0) == pytest.approx(
        ramp.from_per_s + (ramp.to_per_s - ramp.from_per_s) * ramp.time_at_s(25.0) / 10, rel=0.01
    )
    assert rate_at(ramp, 80.0) == pytest.approx(ramp.to_per_s, rel=0.01)


def test_a_linear_ramp_may_start_at_nothing() -> None:
    ramp = LinearRamp(0.0, 10.0, 10.0)
    assert ramp.time_at_s(50.0) == pytest.approx(10.0)
    assert ramp.time_at_s(12.5) == pytest.approx(5.0)


def test_an_exponential_ramp_grows_by_equal_factors() -> None:
    ramp = ExponentialRamp(1.0, 16.0, 4.0)
    let_through = 15.0 / (math.log(16.0) / 4.0)
    assert ramp.time_at_s(let_through) == pytest.approx(4.0)
    for at_s, rate in ((1.0, 2.0), (2.0, 4.0), (3.0, 8.0)):
        requests = (rate - 1.0) / (math.log(16.0) / 4.0)
        assert ramp.time_at_s(requests) == pytest.approx(at_s)
    assert rate_at(ramp, let_through + 5) == pytest.approx(16.0, rel=0.01)


def test_a_pattern_repeats_and_lets_nothing_through_in_a_pause() -> None:
    pattern = Pattern(((0.0, 1.0), (10.0, 2.0), (0.0, 3.0)))
    assert pattern.time_at_s(0.0) == 1.0
    assert pattern.time_at_s(10.0) == 2.0
    assert pattern.time_at_s(20.0) == 7.0  # the pause of 3 s, and the first of the next round
    assert pattern.time_at_s(45.0) == pytest.approx(13.5)


def test_times_never_go_back() -> None:
    for curve in (
        LinearRamp(3.0, 0.5, 7.0),
        ExponentialRamp(4.0, 0.25, 5.0),
        Pattern(((3.0, 1.0), (0.5, 2.0))),
        Steady(2.0),
    ):
        times = [curve.time_at_s(step / 7) for step in range(400)]
        assert times == sorted(times)


def test_ramps_and_patterns_are_read_as_written() -> None:
    assert parse_ramp("linear:1-10:60") == LinearRamp(1.0, 10.0, 60.0)
    assert parse_ramp("exponential:0.5-8:30") == ExponentialRamp(0.5, 8.0, 30.0)
    assert parse_pattern("20:5,2:15") == Pattern(((20.0, 5.0), (2.0, 15.0)))


@pytest.mark.parametrize(
    "text",
    [
        "linear:1-10",
        "linear:a-10:5",
        "cubic:1-2:3",
        "linear:1-0:5",
        "exponential:0-5:5",
        "linear:1-2:-3",
        "linear:1-inf:5",
    ],
)
def test_a_bad_ramp_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be linear:FROM-TO:SECONDS or .* such as linear:1-10:60"):
        parse_ramp(text)


@pytest.mark.parametrize("text", ["", "5", "5:0", "-1:5", "0:5", "5:x", "5:5,"])
def test_a_bad_pattern_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="such as 20:5,2:15"):
        parse_pattern(text)


def test_a_ramp_from_nothing_begins_at_its_start() -> None:
    """The first request is due once nothing has been let through."""
    assert parse_ramp("linear:0-20:2").time_at_s(0.0) == 0.0
    assert parse_ramp("linear:0-20:2").time_at_s(20.0) == pytest.approx(2.0)
