from collections.abc import Sequence

import pytest

from loadgen.results.health import GeneratorHealth, generator_health
from loadgen.results.records import RequestRecord
from tests.loadgen.records import record

LATE = [record(planned_s=1.0, sent_s=1.1)] * 10


def judged(records: Sequence[RequestRecord], gap_s: float | None, cpu_s: tuple[float, ...] = (0.1,)) -> GeneratorHealth:
    return generator_health(records, gap_s, cpu_s, wall_s=10.0)


def test_a_generator_is_late_beyond_a_twentieth_of_the_gap() -> None:
    assert judged(LATE, 1.0).late
    assert "LATE" in judged(LATE, 1.0).warnings[0]
    assert not judged(LATE, 10.0).late
    assert judged(LATE, 10.0).warnings == []


def test_too_soon_is_as_wrong_as_too_late() -> None:
    assert judged([record(planned_s=1.0, sent_s=0.9)] * 10, 1.0).late


def test_five_milliseconds_are_never_late() -> None:
    assert not judged([record(planned_s=1.0, sent_s=1.0049)], 0.001).late
    assert judged([record(planned_s=1.0, sent_s=1.0051)], 0.001).late


def test_a_few_late_ones_are_a_warning_and_half_of_them_are_late() -> None:
    on_time = [record(planned_s=1.0, sent_s=1.0)] * 100
    few = judged([*on_time, *LATE], 1.0)
    assert not few.late
    assert "one request in a hundred" in few.warnings[0]


def test_what_a_cap_held_back_is_not_late() -> None:
    assert not judged([record(planned_s=1.0, sent_s=3.0, held_s=2.0)], 1.0).late


def test_nobody_is_late_where_all_are_due_at_once() -> None:
    assert not judged(LATE, None).late


def test_a_generator_that_fills_its_core_says_so() -> None:
    health = judged([record()], 10.0, (1.0, 9.0))
    assert ["90% of a core" in warning for warning in health.warnings] == [True]
    assert health.cpu_us_per_token == pytest.approx(10e6 / 4)
    assert health.processes == 2
