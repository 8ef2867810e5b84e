import itertools
from random import Random
from statistics import fmean, pstdev

import pytest

from loadgen.schedule.arrivals import arrival_times_s
from loadgen.schedule.curves import Pattern, RateCurve, Steady

N = 20_000


def times_s(curve: RateCurve, law: str, burstiness: float = 1.0, seed: int = 0, n: int = N) -> list[float]:
    return list(itertools.islice(arrival_times_s(curve, law, burstiness, Random(seed)), n))


def gaps_s(law: str, rate_per_s: float, burstiness: float = 1.0, seed: int = 0, n: int = N) -> list[float]:
    return [
        later - sooner for sooner, later in itertools.pairwise(times_s(Steady(rate_per_s), law, burstiness, seed, n))
    ]


@pytest.mark.parametrize("law", ["constant", "poisson", "gamma"])
def test_the_mean_gap_is_one_over_the_rate_under_every_law(law: str) -> None:
    assert fmean(gaps_s(law, 4.0)) == pytest.approx(0.25, rel=0.03)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_vary_by_one_over_the_root_of_the_burstiness(burstiness: float) -> None:
    gaps = gaps_s("gamma", 10.0, burstiness)
    assert fmean(gaps) == pytest.approx(0.1, rel=0.05)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(burstiness**-0.5, rel=0.05)


def test_poisson_gaps_vary_as_much_as_their_mean() -> None:
    gaps = gaps_s("poisson", 10.0)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(1.0, rel=0.05)


def test_constant_gaps_do_not_vary() -> None:
    assert times_s(Steady(2.0), "constant", n=4) == [0.0, 0.5, 1.0, 1.5]


def test_an_infinite_rate_sends_everything_at_the_start() -> None:
    assert times_s(Steady(float("inf")), "poisson", n=3) == [0.0, 0.0, 0.0]


def test_equal_seeds_give_equal_schedules_and_others_do_not() -> None:
    assert gaps_s("poisson", 1.0, seed=5, n=10) == gaps_s("poisson", 1.0, seed=5, n=10)
    assert gaps_s("poisson", 1.0, seed=5, n=10) != gaps_s("poisson", 1.0, seed=6, n=10)


@pytest.mark.parametrize("law", ["constant", "poisson", "gamma"])
def test_every_piece_of_a_pattern_gets_its_own_rate_under_every_law(law: str) -> None:
    found = times_s(Pattern(((20.0, 5.0), (2.0, 15.0))), law, burstiness=0.5 if law == "gamma" else 1.0)
    busy = sum(at_s % 20 < 5 for at_s in found)
    assert busy / len(found) == pytest.approx(100 / 130, rel=0.03)
    assert found[-1] == pytest.approx(N / 130 * 20, rel=0.05)
