"""Was the generator itself good enough? Its lateness and its use of cores, and what they mean for the numbers. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loadgen.results.records import RequestRecord

_LAG_SHARE_OF_GAP = 0.05
_LEAST_LAG_S = 0.005  # timers of the event loop tick in milliseconds, and a busy machine wakes nobody sooner
_BUSY_SHARE = 0.8
_SHORT_S = 1.0  # starting up fills a core of a shorter run, and says nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorHealth:
    """How well the generator kept up."""

    lag_p50_s: float
    lag_p99_s: float
    lag_max_s: float
    """Actual send - planned send, too soon or too late, over all requests; what a cap held back is not in it."""
    allowed_lag_s: float | None
    """For the median; None: everything was due at once, and nobody can be late."""
    cpu_share: float
    """CPU seconds of the busiest generator process per second of the run, which counts as a second at least."""
    cpu_us_per_token: float | None
    """Over all processes; None if no token came."""
    processes: int = 1

    @property
    def late(self) -> bool:
        """True: the load was not the one asked for, and the run does not count."""
        return self.allowed_lag_s is not None and self.lag_p50_s > self.allowed_lag_s

    @property
    def warnings(self) -> list[str]:
        """Why the numbers should not be trusted; empty if they can be."""
        found = []
        more = "lower the rate, or spread it over more --workers"
        if self.late:
            found.append(
                f"the generator was LATE: half of the requests were sent more than {self.lag_p50_s * 1e3:.1f} ms after "
                f"their time, {(self.allowed_lag_s or 0.0) * 1e3:.1f} ms are allowed; the load was not the one asked for: {more}"
            )
        elif self.allowed_lag_s is not None and self.lag_p99_s > 2 * self.allowed_lag_s:
            found.append(
                f"one request in a hundred was sent more than {self.lag_p99_s * 1e3:.1f} ms after its time; bursts were "
                "smoother than asked for"
            )
        if self.cpu_share > _BUSY_SHARE:
            found.append(
                f"a generator process used {self.cpu_share:.0%} of a core; latencies include its own delays: {more}"
            )
        return found


def generator_health(
    records: Sequence[RequestRecord], gap_s: float | None, cpu_s: Sequence[float], wall_s: float
) -> GeneratorHealth:
    """Judge a run. Allowed for the median: 5 % of the mean gap between two arrivals, and never below 5 ms.

    `gap_s` is 0 where each request follows another's end, None where everything is due at once; `cpu_s` is per process.
    """
    lags_s = np.abs([record.send_lag_s for record in records])
    tokens = sum(record.output_tokens for record in records)
    return GeneratorHealth(
        lag_p50_s=float(np.percentile(lags_s, 50)),
        lag_p99_s=float(np.percentile(lags_s, 99)),
        lag_max_s=float(lags_s.max()),
        allowed_lag_s=None if gap_s is None else max(_LEAST_LAG_S, _LAG_SHARE_OF_GAP * gap_s),
        cpu_share=max(cpu_s) / max(wall_s, _SHORT_S),
        cpu_us_per_token=sum(cpu_s) * 1e6 / tokens if tokens else None,
        processes=len(cpu_s),
    )
