"""A paper's experiment as Markdown: what was measured here, and its ratios beside the paper's. Pure."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from loadgen.output.result_json import to_json
from loadgen.papers.experiment import Claim, Experiment
from loadgen.results.result import Result

_READING = (
    "A rate in brackets is what a closed loop came to. The second table has ratios of the system in its third column to the one in its "
    "second; bold: the paper states one too, in brackets. `-`: there were too few samples for it, or none."
)

Cells = Mapping[tuple[str, str], Sequence[Result]]
"""By (workload, system)."""


def paper_table(experiment: Experiment, cells: Cells) -> str:
    """Two tables; several rounds are averaged, and their range is shown beside the ratios."""
    return f"{_measured(experiment, cells)}\n\n{_claims(experiment, cells)}\n\n{_READING}\n"


def _measured(experiment: Experiment, cells: Cells) -> str:
    titles = ["workload", "system", "req/s", *experiment.shown.values()]
    titles += ["mean TPOT (ms)", "prompt tokens cached", "failed"]
    rows = []
    for (workload, system), results in cells.items():
        numbers = [to_json(result) for result in results]
        values = [_mean(numbers, name) for name in (*experiment.shown, "mean_tpot_ms")]
        hits = [result.summary.cache_hit_ratio for result in results]
        rows.append(
            [
                workload,
                system,
                ", ".join(dict.fromkeys(_rate(result) for result in results)),
                *("-" if value is None else _number(value) for value in values[:-1]),
                "-" if values[-1] is None else f"{values[-1]:,.1f}",
                "-" if None in hits else f"{fmean(hit or 0.0 for hit in hits):.0%}",
                str(sum(result.summary.failed for result in results)),
            ]
        )
    return _markdown(titles, rows)


def _claims(experiment: Experiment, cells: Cells) -> str:
    titles = [
        "workload",
        "instead of",
        "system",
        *(f"{_bare(title)}: here (paper)" for title in experiment.shown.values()),
    ]
    rows = []
    for claim in experiment.claims:
        base, other = cells.get((claim.workload, claim.base)), cells.get((claim.workload, claim.other))
        if base and other:
            shown = [_ratio(claim, name, base, other) for name in experiment.shown]
            rows.append([claim.workload, claim.base, claim.other, *shown])
    notes = [f"{claim.workload}, {claim.other}: {claim.note}" for claim in experiment.claims if claim.note]
    return "\n\n".join([_markdown(titles, rows), *notes])


def _ratio(claim: Claim, name: str, base: Sequence[Result], other: Sequence[Result]) -> str:
    """Other over base, round by round."""
    pairs = [(to_json(mine).get(name), to_json(theirs).get(name)) for theirs, mine in zip(base, other, strict=False)]
    ratios = [mine / theirs for mine, theirs in pairs if mine is not None and theirs]
    here = "-" if not ratios else f"{fmean(ratios):.2f}"
    if len(ratios) > 1:
        here += f" [{min(ratios):.2f}, {max(ratios):.2f}]"
    stated = claim.changes.get(name)
    return here if stated is None else f"**{here}** ({stated:.2f})"


def _rate(result: Result) -> str:
    """A closed loop has none of its own: what it came to."""
    rate = result.facts.request_rate
    return f"({result.summary.requests_per_s:.2f})" if rate is None else f"{rate:.2f}"


def _number(value: float) -> str:
    """Shares with their digits, the rest without."""
    return f"{value:.2f}" if abs(value) < 2 else f"{value:,.0f}"


def _bare(title: str) -> str:
    """A ratio has no unit."""
    return title.removesuffix(" (ms)")


def _mean(numbers: Sequence[Mapping[str, object]], name: str) -> float | None:
    values = [value for one in numbers if isinstance(value := one[name], int | float)]
    return fmean(values) if len(values) == len(numbers) else None


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
