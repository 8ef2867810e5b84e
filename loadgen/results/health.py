"""Was the generator itself good enough? Its lateness and its use of a core, and what they mean for the numbers. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loadgen.results.records import RequestRecord

_LAG_SHARE_OF_GAP = 0.05
_LEAST_LAG_S = 0.005  # timers of the event loop tick in milliseconds
_BUSY_SHARE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorHealth:
    """How well the generator kept up."""

    lag_p50_s: float
    lag_p99_s: float
    lag_max_s: float
    """Actual send - planned send, over all requests of the run."""
    allowed_lag_s: float
    cpu_share: float
    """CPU seconds of this process per second of the run."""
    cpu_us_per_token: float | None
    """None if no token came."""

    @property
    def warnings(self) -> list[str]:
        """Why the numbers should not be trusted; empty if they can be."""
        found = []
        if self.lag_p99_s > self.allowed_lag_s:
            found.append(
                f"the generator was late: p99 send lag {self.lag_p99_s * 1e3:.1f} ms, allowed "
                f"{self.allowed_lag_s * 1e3:.1f} ms; the load was not the one asked for"
            )
        if self.cpu_share > _BUSY_SHARE:
            found.append(
                f"the generator used {self.cpu_share:.0%} of a core; latencies include its own delays: "
                "lower the rate or run several generators"
            )
        return found


def generator_health(
    records: Sequence[RequestRecord], rate_per_s: float | None, cpu_s: float, wall_s: float
) -> GeneratorHealth:
    """Judge a run. `rate_per_s` is None for a closed loop. Allowed lag: 5 % of the mean gap, and never below 5 ms."""
    lags_s = np.array([record.send_lag_s for record in records])
    tokens = sum(record.output_tokens for record in records)
    gap_s = 1.0 / rate_per_s if rate_per_s else 0.0
    return GeneratorHealth(
        lag_p50_s=float(np.percentile(lags_s, 50)),
        lag_p99_s=float(np.percentile(lags_s, 99)),
        lag_max_s=float(lags_s.max()),
        allowed_lag_s=max(_LEAST_LAG_S, _LAG_SHARE_OF_GAP * gap_s),
        cpu_share=cpu_s / max(wall_s, 1e-9),
        cpu_us_per_token=cpu_s * 1e6 / tokens if tokens else None,
    )
