import math

import numpy as np
import pytest

from loadgen.stats.sweep import FindRate, ListedRates, Point, Search


def drive(
    search: Search, limit_per_s: float, noise: float = 0.0, seed: int = 0, sends_at_most: float = 1e9
) -> list[float]:
    """A server whose attainment falls from 1 with the rate and is 0.9 at the limit; rates as they were asked for."""
    rng, asked = np.random.default_rng(seed), []
    while (rate := search.next_rate()) is not None:
        asked.append(rate)
        true = 1 / (1 + (rate / limit_per_s) ** 4 / 9)
        seen = float(np.clip(true + rng.normal(0, noise), 0, 1)) if noise else true
        interval = (seen - 2 * noise, seen + 2 * noise) if noise else None
        search.add(Point(rate_per_s=rate, attainment=seen, interval=interval, late=rate > sends_at_most))
        assert len(asked) < 100
    return asked


@pytest.mark.parametrize("limit_per_s", [0.06, 0.7, 1.0, 3.3, 97.0])
def test_the_best_is_within_the_tolerance_below_the_limit(limit_per_s: float) -> None:
    search = FindRate(1.0, tolerance=0.05)
    asked = drive(search, limit_per_s)
    best = search.best()
    assert best is not None
    assert best <= limit_per_s < best * 1.05
    assert len(asked) == len(set(asked)) <= 14
    assert "missed at" in search.why_stopped
    assert search.next_rate() is None


def test_asking_twice_gives_the_same_rate() -> None:
    search = FindRate(3.0)
    assert search.next_rate() == search.next_rate() == 3.0
    search.add(Point(rate_per_s=3.0, attainment=1.0))
    assert search.next_rate() == search.next_rate() == 6.0


def test_noise_moves_the_best_little() -> None:
    found = []
    for seed in range(40):
        search = FindRate(1.0)
        drive(search, 10.0, noise=0.02, seed=seed)
        found.append(search.best() or 0.0)
    assert 8.0 < float(np.median(found)) < 11.0
    assert sum(7.0 < best < 12.5 for best in found) >= 38


def test_a_point_at_the_edge_is_measured_once_more_and_both_count() -> None:
    search = FindRate(4.0)
    search.add(Point(rate_per_s=4.0, attainment=0.91, interval=(0.85, 0.95)))
    assert search.next_rate() == 4.0
    search.add(Point(rate_per_s=4.0, attainment=0.87, interval=(0.85, 0.95)))
    assert search.best() is None  # 0.89 on average
    assert search.next_rate() == 2.0


def test_a_clear_point_is_not_repeated() -> None:
    search = FindRate(4.0)
    search.add(Point(rate_per_s=4.0, attainment=0.97, interval=(0.95, 0.99)))
    assert search.next_rate() == 8.0


def test_a_lucky_point_above_a_failure_is_not_believed() -> None:
    search = FindRate(1.0)
    for rate, attainment in ((1.0, 1.0), (2.0, 0.5), (1.5, 0.7), (1.8, 0.92)):
        search.add(Point(rate_per_s=rate, attainment=attainment))
    assert search.best() == 1.0


def test_a_saturated_point_fails_whatever_it_attained() -> None:
    search = FindRate(1.0)
    search.add(Point(rate_per_s=1.0, attainment=1.0))
    search.add(Point(rate_per_s=2.0, attainment=1.0, saturated=True))
    assert search.best() == 1.0
    assert search.next_rate() == pytest.approx(math.sqrt(2))


def test_a_late_generator_bounds_the_search_and_is_never_the_best() -> None:
    search = FindRate(1.0)
    drive(search, 1000.0, sends_at_most=5.0)
    best = search.best()
    assert best is not None
    assert 5.0 / 1.1 <= best <= 5.0
    assert "generator" in search.why_stopped


def test_targets_out_of_reach_end_the_search() -> None:
    search = FindRate(1.0, max_runs=50)
    asked = drive(search, 1e-6)
    assert search.best() is None
    assert len(asked) == 8
    assert "every load" in search.why_stopped
    search = FindRate(1.0, max_runs=50)
    drive(search, 1.0, sends_at_most=0.0)
    assert search.best() is None
    assert "generator" in search.why_stopped


def test_runs_are_limited() -> None:
    search = FindRate(1.0, max_runs=3)
    assert drive(search, 1e6) == [1.0, 2.0, 4.0]
    assert search.best() == 4.0
    assert "3 runs" in search.why_stopped


def test_listed_rates_are_measured_as_listed() -> None:
    search = ListedRates([4.0, 1.0, 2.0])
    assert drive(search, 3.0) == [4.0, 1.0, 2.0]
    assert search.best() == 2.0
    assert "3 rates" in search.why_stopped


@pytest.mark.parametrize(
    "bad", [{"start_per_s": 0}, {"attainment": 0}, {"attainment": 1.1}, {"tolerance": 0}, {"max_runs": 0}]
)
def test_a_search_that_cannot_be_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        FindRate(**{"start_per_s": 1.0, **bad})  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ValueError, match="above 0"):
        ListedRates([1.0, math.inf])
