"""A sweep as a console table and as JSON. Pure."""

from collections.abc import Sequence
from typing import Any  # Any: JSON

from loadgen.results.metrics import Distribution
from loadgen.results.result import Result

_COLUMNS = ("req/s", "answered/s", "tok/s", "TTFT p50", "p99", "TPOT p50", "p99", "E2E p50", "met", "")


def sweep_head() -> str:
    """The line above the rows; latencies are in milliseconds, throughput is over the whole run."""
    return _line(_COLUMNS)


def sweep_row(result: Result) -> str:
    """One rate."""
    facts, summary = result.facts, result.summary
    marks = [f"{summary.failed} failed"] if summary.failed else []
    marks += ["saturated"] if result.saturated else []
    marks += ["too few requests to see saturation"] if result.saturation is None else []
    marks += ["generator late"] if result.health.late else []
    return _line(
        (
            f"{facts.request_rate or 0.0:.3g}",
            f"{summary.requests_per_s:.3g}",
            f"{summary.output_tokens_per_s:.0f}",
            *_latency(summary.ttft),
            *_latency(summary.tpot),
            _latency(summary.e2e)[0],
            "-" if summary.attainment is None else f"{summary.attainment:.1%}",
            ", ".join(marks),
        )
    )


def sweep_verdict(best: float | None, why_stopped: str, attainment: float, *, with_targets: bool) -> str:
    """What the sweep found."""
    if not with_targets:
        return why_stopped
    found = (
        f"highest rate found at which {attainment:.0%} met the targets: {best:.3g} req/s"
        if best is not None
        else "no rate met the targets"
    )
    return f"{found} ({why_stopped})"


def sweep_json(results: Sequence[Result], best: float | None, why_stopped: str, attainment: float) -> dict[str, Any]:
    """What the sweep found, and where; the runs' own numbers are in their folders."""
    points = [
        {
            "request_rate": result.facts.request_rate,
            "attainment": result.summary.attainment,
            "request_goodput": result.summary.goodput_per_s,
            "saturated": result.saturated,
            "generator_late": result.health.late,
        }
        for result in results
    ]
    return {"best_rate": best, "attainment": attainment, "why_stopped": why_stopped, "points": points}


def _latency(shown: Distribution | None) -> tuple[str, str]:
    if shown is None:
        return "-", "-"
    return f"{shown.p50_s * 1e3:.1f}", "-" if shown.p99_s is None else f"{shown.p99_s * 1e3:.1f}"


def _line(cells: Sequence[str]) -> str:
    *numbers, remark = cells
    return "".join(f"{cell:>11}" for cell in numbers) + (f"  {remark}" if remark else "")
