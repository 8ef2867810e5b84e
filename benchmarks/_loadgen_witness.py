"""What the server itself says of a run that load generators measured from outside."""

from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import Protocol

from benchmarks._loadgen_tools import Figures
from benchmarks._scripted_server import Truth
from benchmarks._scripted_truth import ScriptedServer, lateness_s, true_figures
from benchmarks._serving import Serving

_SUMS = ("ttft_seconds", "itl_seconds", "e2e_seconds")


@dataclass(frozen=True, slots=True)
class Told:
    """One run as its server saw it."""

    figures: Figures
    connections: int | None
    """New ones that it accepted; None: it does not tell."""
    lateness_p99_ms: float | None
    """Its own deviation from its timetable; None: it has none."""
    turnaround_ms: float | None
    """Of a closed loop: how long a place stayed empty from one request to the next, median; None: not known."""


class Witness(Protocol):
    """Somebody at the server."""

    def forget(self) -> None:
        """A run begins."""
        ...

    def tell(self) -> Told:
        """What happened since `forget`."""
        ...


class ScriptedWitness:
    """Every chunk as it was sent."""

    def __init__(self, server: ScriptedServer) -> None:
        self._server = server

    def forget(self) -> None:
        """A run begins."""
        self._server.take_truth()

    def tell(self) -> Told:
        """What happened since `forget`."""
        truth = self._server.take_truth()
        late_s = lateness_s(truth)
        connections = sum(request.first_on_connection for request in truth.requests)
        return Told(true_figures(truth), connections, 1e3 * late_s[int(0.99 * len(late_s))], _turnaround_ms(truth))


def _turnaround_ms(truth: Truth) -> float | None:
    """Places are as many as requests were ever open at once; the k-th end makes room for arrival k + places."""
    arrivals_s = sorted(request.arrival_s for request in truth.requests)
    ends_s = sorted(request.sent_s[-1] for request in truth.requests)
    changes = sorted([(at_s, 1) for at_s in arrivals_s] + [(at_s, -1) for at_s in ends_s])
    places = max(accumulate(change for _, change in changes))
    empty_s = [arrival_s - end_s for arrival_s, end_s in zip(arrivals_s[places:], ends_s, strict=False)]
    return 1e3 * median(empty_s) if empty_s else None


class PenstockWitness:
    """Sums of the gateway's /metrics: means only, from when its code got the request to when it handed the tokens on."""

    def __init__(self, system: Serving) -> None:
        self._system = system
        self._before: dict[str, float] = {}

    def forget(self) -> None:
        """A run begins."""
        self._before = self._totals()

    def tell(self) -> Told:
        """What happened since `forget`."""
        now = self._totals()
        since = {name: now[name] - self._before[name] for name in now}
        mean_ms = {name: 1e3 * since[f"{name}_sum"] / max(1.0, since[f"{name}_count"]) for name in _SUMS}
        figures = Figures(
            ttft_mean_ms=mean_ms["ttft_seconds"],
            ttft_p50_ms=None,
            tpot_mean_ms=mean_ms["itl_seconds"],
            tpot_p50_ms=None,
            itl_mean_ms=mean_ms["itl_seconds"],
            itl_p50_ms=None,
            e2e_mean_ms=mean_ms["e2e_seconds"],
            requests_per_s=None,
            output_tokens_per_s=None,
            input_tokens_mean=since["prompt_tokens_total"] / max(1.0, since["e2e_seconds_count"]),
            requests=round(since["e2e_seconds_count"]),
            output_tokens=round(since["generated_tokens_total"]),
        )
        return Told(figures, None, None, None)

    def _totals(self) -> dict[str, float]:
        names = [f"{name}_{part}" for name in _SUMS for part in ("sum", "count")]
        names += ["prompt_tokens_total", "generated_tokens_total"]
        return {name: self._system.total(f"penstock_gateway_{name}") for name in names}
