from dataclasses import replace

import numpy as np
import pytest

from loadgen.results.records import Outcome, RequestRecord
from loadgen.stats.saturation import judge
from tests.loadgen.records import record
from tests.loadgen.stats.queues import poisson_queue, queue


def detected(records: list[RequestRecord]) -> bool:
    verdict = judge(records)
    return verdict is not None and verdict.detected


@pytest.mark.long
@pytest.mark.parametrize(("servers", "n_requests"), [(1, 100), (4, 200), (16, 300)])
def test_a_stable_queue_is_hardly_ever_called_saturated(servers: int, n_requests: int) -> None:
    busy = [detected(poisson_queue(seed, 0.8, servers, n_requests)) for seed in range(60)]
    assert sum(busy) <= 5
    assert not any(detected(poisson_queue(seed, 0.5, servers, n_requests)) for seed in range(10))


@pytest.mark.parametrize(("servers", "n_requests"), [(1, 300), (16, 300)])
def test_an_overloaded_queue_nearly_always_is(servers: int, n_requests: int) -> None:
    assert sum(detected(poisson_queue(seed, 1.3, servers, n_requests)) for seed in range(20)) >= 17
    assert all(detected(poisson_queue(seed, 2.0, servers, n_requests)) for seed in range(5))


def test_overload_that_hides_in_a_short_window_is_seen_by_its_latency() -> None:
    assert all(detected(poisson_queue(seed, 10.0, 4, 100)) for seed in range(5))


def test_a_rising_rate_that_the_server_keeps_up_with_is_no_saturation() -> None:
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        span_s = 600 / 60.0
        arrivals_s = span_s * np.sqrt(np.sort(rng.uniform(0, 1, 600)))  # the rate rises from 0 to 120 a second
        found.append(detected(queue(rng, arrivals_s, 200)))
    assert sum(found) <= 2


def test_a_cap_on_concurrency_does_not_hide_the_queue() -> None:
    records = poisson_queue(1, 2.0, 4, 200)
    held = [replace(one, held_s=one.e2e_s - 1.0, sent_s=one.end_s - 1.0) for one in records if one.e2e_s is not None]
    assert detected(held)
    at_client = [replace(one, held_s=0.0) for one in held]
    assert not detected(at_client)


def test_a_server_that_turns_half_of_its_load_away_is_saturated() -> None:
    answered = [record(index=i, sent_s=i * 0.1, end_s=i * 0.1 + 0.5) for i in range(200)]
    assert not detected(answered)
    away = [replace(one, outcome=Outcome.REJECTED) if one.index % 2 else one for one in answered]
    assert detected(away)
    broken = [replace(one, outcome=Outcome.HTTP_ERROR) if one.index % 2 else one for one in answered]
    assert not detected(broken)


def test_too_few_requests_and_a_single_burst_are_not_judged() -> None:
    overloaded = poisson_queue(0, 2.0, 1, 99)
    assert judge(overloaded) is None
    assert judge([record(index=i, sent_s=1.0) for i in range(200)]) is None
    cancelled = [record(index=i, sent_s=i, outcome=Outcome.CANCELLED) for i in range(50)]
    assert judge([*overloaded[:60], *cancelled]) is None


def test_the_verdict_tells_its_numbers() -> None:
    verdict = judge(poisson_queue(0, 1.3, 4, 300))
    assert verdict is not None
    assert "262 were answered of 292" in verdict.why
