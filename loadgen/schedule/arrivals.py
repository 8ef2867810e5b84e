"""When requests are sent: arrival times from a rate, a law and a source of chance. Pure."""

import math
from collections.abc import Callable, Mapping
from random import Random

LAWS = ("poisson", "constant", "gamma")


def schedule_s(law: str, rate_per_s: float, burstiness: float, n_requests: int, random: Random) -> list[float]:
    """Planned send times of `n_requests`, seconds after the start, ascending; the first is 0.

    The gaps between neighbours have mean 1 / rate under every law:
      constant   always 1 / rate
      poisson    exponential, coefficient of variation 1
      gamma      shape b, scale 1 / (rate * b), coefficient of variation 1 / sqrt(b); b = 1 is poisson,
                 b < 1 bursty, b > 1 more regular
    Nothing is rescaled: a short schedule may last longer or shorter than n / rate. A rate of infinity sends all at 0.
    """
    if math.isinf(rate_per_s):
        return [0.0] * n_requests
    draws: Mapping[str, Callable[[], float]] = {
        "constant": lambda: 1.0 / rate_per_s,
        "poisson": lambda: random.expovariate(rate_per_s),
        "gamma": lambda: random.gammavariate(burstiness, 1.0 / (rate_per_s * burstiness)),
    }
    draw_gap_s = draws[law]
    times_s, now_s = [], 0.0
    for _ in range(n_requests):
        times_s.append(now_s)
        now_s += draw_gap_s()
    return times_s
