"""What failed, by class, with the first example of each text."""

from collections.abc import Sequence

from loadgen.output.html.run_view import RunView
from loadgen.output.html.section import Section, Table
from loadgen.output.html.wording import UNKNOWN, plural, quantity, seconds

_TEXTS_PER_CLASS = 3
_LONGEST_TEXT = 300


def build(runs: Sequence[RunView]) -> Section | None:
    """None if nothing failed."""
    rows = [row for run in runs for row in _rows(run, several=len(runs) > 1)]
    if not rows:
        return None
    n_failed = sum(record.outcome.failed for run in runs for record in run.result.records)
    head = ("Class", "Requests", "First at", "Status", "What was said")
    first = ("Run",) if len(runs) > 1 else ()
    text_columns = frozenset({0, 1, 5} if first else {0, 4})
    table = Table(head=(*first, *head), rows=tuple(rows), text_columns=text_columns)
    return Section(
        name="errors", title="Errors", short="Errors", note=f"{plural(n_failed, 'request')} failed.", tables=(table,)
    )


def _rows(run: RunView, *, several: bool) -> list[tuple[str, ...]]:
    failed = sorted((r for r in run.result.records if r.outcome.failed), key=lambda record: record.sent_s)
    rows: list[tuple[str, ...]] = []
    for outcome in dict.fromkeys(record.outcome for record in failed):
        members = [record for record in failed if record.outcome is outcome]
        texts = list(dict.fromkeys(record.detail for record in members))
        for text in texts[:_TEXTS_PER_CLASS]:
            same = [record for record in members if record.detail == text]
            status = UNKNOWN if same[0].http_status is None else str(same[0].http_status)
            cells = (outcome.value, quantity(len(same)), seconds(same[0].sent_s), status, text[:_LONGEST_TEXT])
            rows.append((run.name, *cells) if several else cells)
        if len(texts) > _TEXTS_PER_CLASS:
            others = sum(record.detail not in texts[:_TEXTS_PER_CLASS] for record in members)
            text = f"and {plural(len(texts) - _TEXTS_PER_CLASS, 'other text')}"
            cells = (outcome.value, quantity(others), UNKNOWN, UNKNOWN, text)
            rows.append((run.name, *cells) if several else cells)
    return rows
