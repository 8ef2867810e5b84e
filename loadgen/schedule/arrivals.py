"""When requests arrive: a rate curve, a law of gaps and a source of chance give times. Pure."""

from collections.abc import Callable, Iterator, Mapping
from random import Random

from loadgen.schedule.curves import RateCurve

LAWS = ("poisson", "constant", "gamma")


def arrival_times_s(curve: RateCurve, law: str, burstiness: float, random: Random) -> Iterator[float]:
    """Times of an endless stream of requests, seconds after the start, ascending; the first is as soon as the curve lets it.

    At a steady rate the gaps between neighbours have mean 1 / rate under every law:
      constant   always 1 / rate
      poisson    exponential, coefficient of variation 1
      gamma      shape b, scale 1 / (rate * b), coefficient of variation 1 / sqrt(b); b = 1 is poisson,
                 b < 1 bursty, b > 1 more regular
    Where the rate changes, the same gaps are stretched and squeezed with it. Nothing is rescaled: a short schedule may last
    longer or shorter than n / rate.
    """
    draws: Mapping[str, Callable[[], float]] = {
        "constant": lambda: 1.0,
        "poisson": lambda: random.expovariate(1.0),
        "gamma": lambda: random.gammavariate(burstiness, 1.0 / burstiness),
    }
    draw_gap, passed = draws[law], 0.0
    while True:
        yield curve.time_at_s(passed)
        passed += draw_gap()
