"""The kill matrix as text: one row per cell, and what was slowest."""

from collections.abc import Sequence

from tests.faults.matrix.trial import Outcome

_HEAD = ("victim", "phase", "how", "client got", "after, s", "other client, s", "all freed, s", "")
ROW = "{:8} {:14} {:6} {:8} {:>7} {:>7} {:>7}  {}"
HEADLINE = ROW.format("victim", "phase", "how", "got", "answer", "other", "freed", "")


def line(outcome: Outcome) -> str:
    """One row for a terminal."""
    return ROW.format(*_fields(outcome)).rstrip()


def _fields(outcome: Outcome) -> tuple[str, ...]:
    cell, got = outcome.cell, "-" if outcome.got is None else str(outcome.got)
    times = (f"{s:.1f}" for s in (outcome.answered_s, outcome.others_s, outcome.freed_s))
    said = "; ".join(outcome.problems)
    return (cell.victim, cell.phase, str(cell.mode), got, *times, f"FAILED: {said}" if said else "")


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many hold, and the slowest of each kind."""
    good = [outcome for outcome in outcomes if outcome.ok]
    if not good:
        return f"0 of {len(outcomes)} cells hold"
    parts = [f"{len(good)} of {len(outcomes)} cells hold"]
    for what, key in (
        ("answer", "answered_s"),
        ("other client's answer", "others_s"),
        ("return of what was held", "freed_s"),
    ):
        slowest = max(good, key=lambda outcome: float(getattr(outcome, key)))
        parts.append(f"slowest {what} {getattr(slowest, key):.1f} s ({slowest.cell})")
    return "; ".join(parts)


def markdown(outcomes: Sequence[Outcome], how: str) -> str:
    """The whole as a table. `how`: the command and what it ran on."""
    ordered = sorted(outcomes, key=lambda outcome: str(outcome.cell))
    rows = ["| " + " | ".join(_fields(outcome)) + " |" for outcome in ordered]
    head = ["| " + " | ".join(_HEAD) + " |", "|---|---|---|---|---:|---:|---:|---|"]
    return "\n".join([how, "", summary(outcomes), "", *head, *rows, ""])
