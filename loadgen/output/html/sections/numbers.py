"""The key numbers: of one run in full, of several a row each."""

from collections.abc import Sequence

from loadgen.output.html.run_view import RunView
from loadgen.output.html.section import Section, Table
from loadgen.output.html.sections.curves import tail_percent
from loadgen.output.html.wording import NBSP, UNKNOWN, latency, per_second, quantity, seconds, share
from loadgen.results.metrics import Distribution, samples_needed

_LATENCIES = (
    ("ttft", "Time to first token (TTFT)"),
    ("ttst", "Time to second token (TTST)"),
    ("tpot", "Time per output token (TPOT)"),
    ("itl", "Inter-token latency (ITL)"),
    ("chunk_gap", "Inter-chunk latency"),
    ("e2e", "End to end (E2E)"),
)
_PERCENTS = (50, 90, 95, 99)


def build(runs: Sequence[RunView]) -> Section:
    """Latencies and throughput."""
    if len(runs) > 1:
        return Section(name="numbers", title="Key numbers", short="Numbers", tables=(_compared(runs),))
    if runs[0].answered:
        note = _refused([d for name, _ in _LATENCIES if (d := getattr(runs[0].result.summary, name)) is not None])
    else:
        note = "Nothing was answered, so no latency is known."
    return Section(
        name="numbers",
        title="Key numbers",
        short="Numbers",
        note=note,
        tables=_latencies(runs[0]),
        facts=_totals(runs[0]),
    )


def _refused(shown: Sequence[Distribution]) -> str:
    """`p95 is given from 40 samples on, p99 from 200.`; empty: every percentile has enough."""
    missing = [percent for percent in _PERCENTS if any(one.trusted_s(percent) is None for one in shown)]
    parts = [
        f"p{percent} {'from' if number else 'is given from'} {samples_needed(percent)}"
        + ("" if number else " samples on")
        for number, percent in enumerate(missing)
    ]
    return f"{', '.join(parts)}." if parts else ""


def _latencies(run: RunView) -> tuple[Table, ...]:
    summary = run.result.summary
    rows = []
    for name, title in _LATENCIES:
        shown: Distribution | None = getattr(summary, name)
        if shown is None or (name == "chunk_gap" and (summary.tokens_per_chunk or 1) <= 1.005):
            continue
        values_s = (shown.mean_s, *map(shown.trusted_s, _PERCENTS), shown.max_s)
        rows.append((title, *map(latency, values_s), quantity(shown.samples)))
    head = ("Latency", "Mean", "p50", "p90", "p95", "p99", "Max", "Samples")
    return (Table(head=head, rows=tuple(rows)),) if rows else ()


def _totals(run: RunView) -> tuple[tuple[str, str], ...]:
    summary, health = run.result.summary, run.result.health
    cached = None if summary.cached_tokens is None else summary.cached_tokens / max(1, summary.input_tokens)
    rows = [
        ("Answered", quantity(summary.completed)),
        ("Failed", quantity(summary.failed)),
        ("Left on purpose", quantity(summary.cancelled) if summary.cancelled else UNKNOWN),
        ("Duration", seconds(summary.duration_s)),
        ("Request throughput", per_second(summary.requests_per_s)),
        ("Goodput", UNKNOWN if summary.goodput_per_s is None else per_second(summary.goodput_per_s)),
        ("Attainment", share(run.attainment)),
        ("Output throughput", f"{quantity(summary.output_tokens_per_s)}{NBSP}tok/s"),
        ("Peak output", f"{quantity(summary.peak_output_tokens_per_s)}{NBSP}tok/s"),
        ("Total throughput", f"{quantity(summary.total_tokens_per_s)}{NBSP}tok/s"),
        ("Input tokens", quantity(summary.input_tokens)),
        ("Output tokens", quantity(summary.output_tokens)),
        ("Input from cache", share(cached)),
        ("In flight, mean", quantity(summary.mean_concurrent)),
        ("In flight, most", quantity(summary.peak_concurrent)),
        ("Send lag p99", latency(health.lag_p99_s)),
        ("Generator CPU", f"{share(health.cpu_share)} of a core"),
    ]
    return tuple(row for row in rows if row[1] != UNKNOWN)


def _compared(runs: Sequence[RunView]) -> Table:
    tail = tail_percent(runs)
    with_slo = any(run.slo is not None for run in runs)
    with_marks = any(run.saturated or run.late for run in runs)
    rows = []
    for run in runs:
        summary = run.result.summary
        good = UNKNOWN if summary.goodput_per_s is None else per_second(summary.goodput_per_s)
        notes = [text for text, found in (("saturated", run.saturated), ("late", run.late)) if found]
        rows.append(
            (
                run.name,
                quantity(summary.completed),
                quantity(summary.failed),
                per_second(summary.requests_per_s),
                *((good, share(run.attainment)) if with_slo else ()),
                quantity(summary.output_tokens_per_s),
                *(_ms(run.percentile_ms(name, q)) for name in ("ttft", "tpot") for q in (50, tail)),
                *((", ".join(notes),) if with_marks else ()),
            )
        )
    slo_head = ("Goodput", "Attained") if with_slo else ()
    heads = [f"{name} p{q}" for name in ("TTFT", "TPOT") for q in (50, tail)]
    head = (
        "Run",
        "Answered",
        "Failed",
        "Requests",
        *slo_head,
        "Output tok/s",
        *heads,
        *(("Marks",) if with_marks else ()),
    )
    return Table(head=head, rows=tuple(rows), text_columns=frozenset({0, len(head) - 1} if with_marks else {0}))


def _ms(value_ms: float | None) -> str:
    return latency(None if value_ms is None else value_ms / 1e3)
