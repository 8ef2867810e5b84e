"""A comparison as a console table, as Markdown and as JSON. Pure."""

from collections.abc import Sequence
from typing import Any  # Any: JSON

import msgspec

from loadgen.stats.assertions import Verdict as AssertionVerdict
from loadgen.stats.compare import Comparison, Row, Verdict

_WIDTH = 100
_COLUMNS = ("", "base", "other", "other / base", "verdict")
_TITLES = {
    "mean_itl_ms": "Mean ITL (ms)",
    "request_throughput": "Request throughput (req/s)",
    "output_throughput": "Output token throughput (tok/s)",
    "total_token_throughput": "Total token throughput (tok/s)",
    "request_goodput": "Request goodput (req/s)",
    "attainment": "Attainment (share)",
    "failed_share": "Failed requests (share)",
}


def table(comparison: Comparison, verdicts: Sequence[AssertionVerdict]) -> str:
    """For the console: the numbers, what limits them, and the gates."""
    lines = [
        " A/B, 95 % intervals ".center(_WIDTH, "="),
        _line(_COLUMNS),
        "-" * _WIDTH,
        *(_line(_cells(row)) for row in comparison.rows),
        "=" * _WIDTH,
        *_remarks(comparison, verdicts),
    ]
    return "\n".join(lines)


def markdown(comparison: Comparison, verdicts: Sequence[AssertionVerdict]) -> str:
    """For an issue or a page: a table, then the same remarks as a list."""
    head = f"| {' | '.join(_COLUMNS)} |\n| --- | ---: | ---: | --- | --- |"
    rows = [f"| {' | '.join(_cells(row))} |" for row in comparison.rows]
    # A bar would end a cell, but remarks stand outside of the table.
    return "\n".join([head, *rows, "", *(f"- {remark}" for remark in _remarks(comparison, verdicts))])


def to_json(comparison: Comparison, verdicts: Sequence[AssertionVerdict]) -> dict[str, Any]:
    """Everything, numbers in the units of result.json's keys."""
    found: dict[str, Any] = msgspec.to_builtins(comparison)
    found["confidence"] = 0.95
    found["assertions"] = msgspec.to_builtins(verdicts)
    return found


def title(name: str) -> str:
    """What a key of result.json is called: `P99 TTFT (ms)`."""
    if name in _TITLES:
        return _TITLES[name]
    column, latency, _ = name.split("_")
    return f"{column.capitalize()} {latency.upper()} (ms)"


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    if row.ratio is None:
        ratio = "-"
    else:
        ratio = f"{row.ratio.value:.3f}  [{row.ratio.low:.3f}, {row.ratio.high:.3f}]"
    digits = 4 if row.name in ("attainment", "failed_share") else 2
    base, other = ("-" if value is None else f"{value:.{digits}f}" for value in (row.base, row.other))
    shown = row.verdict.upper() if row.verdict in (Verdict.LOWER, Verdict.HIGHER) else str(row.verdict)
    return title(row.name), base, other, ratio, shown


def _line(cells: Sequence[str]) -> str:
    name, base, other, ratio, verdict = cells
    return f"{name:<32}{base:>12}{other:>12}   {ratio:<23}  {verdict}".rstrip()


def _remarks(comparison: Comparison, verdicts: Sequence[AssertionVerdict]) -> list[str]:
    found = []
    if comparison.not_the_same_work:
        found.append(f"warning: not the same work: {'; '.join(comparison.not_the_same_work)}")
    found += [f"warning: {text}" for text in comparison.warnings]
    found += [f"note: {text}" for text in comparison.notes]
    return found + [f"assert: {verdict.why}" for verdict in verdicts]
