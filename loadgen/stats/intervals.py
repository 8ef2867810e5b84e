"""How far a run's numbers may be off: bootstrap intervals. Pure; method and sources in `loadgen.stats.resampling`.

What they cover: which requests the run happened to hold, and how luck queued neighbours.
What they do not cover: another run. A server that was restarted, warmer, shared with others or placed elsewhere differs
by more than a run can show from inside; for that, measure several runs and `penstock bench compare` them.

Measured on queues whose true mean latency is known (M/M/1, 1,000 requests, 300 runs): the 95 % interval held it in 89 % of
the runs at a load of 0.5 and in 77 % at 0.8; had single requests been drawn, in 45 % and 17 %. Where requests do not
queue it held in 93 to 96 % (100 to 1,000 requests). So near saturation intervals are still too narrow: run longer.
"""

from collections.abc import Sequence

from loadgen.results.metrics import Slo
from loadgen.results.records import Outcome, RequestRecord
from loadgen.stats.measures import SHARES, latencies, requests_of, shares
from loadgen.stats.resampling import Interval, bounds, estimates

_SEED = (20,)
"""Fixed: the same records give the same report."""


def intervals(records: Sequence[RequestRecord], slo: Slo | None = None) -> dict[str, Interval]:
    """95 % intervals of a run's numbers, by their keys in result.json.

    `mean_` and, with enough samples, `p50_`, `p90_`, `p95_`, `p99_` of `ttft_ms`, `ttst_ms`, `tpot_ms` and `e2el_ms`;
    `mean_itl_ms`, `failed_share`, and with targets `attainment`. Empty where no request was measured.
    """
    if not any(record.measured and record.outcome is not Outcome.CANCELLED for record in records):
        return {}
    requests = requests_of([records])
    n_units = sum(requests.units.per_run)
    seen, drawn = estimates([*latencies(requests), *shares(requests, slo)], requests.units, _SEED)
    found = {}
    for name, value in seen.items():
        ends = bounds(drawn[name], n_units)
        if ends is None:
            continue
        if name in SHARES and value in (0.0, 1.0):
            # No draw can show what never happened; the rule of three says how often it may happen all the same.
            ends = (0.0, min(1.0, 3 / n_units)) if value == 0.0 else (max(0.0, 1 - 3 / n_units), 1.0)
        found[name] = Interval(value=value, low=ends[0], high=ends[1])
    return found
