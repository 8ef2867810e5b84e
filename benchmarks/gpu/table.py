"""The result of a GPU benchmark: rows, and how they are written and read."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """A measured value, and beside what it is to be read."""

    name: str
    value: float
    unit: str
    ratio: float | None
    against: str


def run_and_write(run: Callable[[bool], list[Row]], description: str | None) -> None:
    """The command line of one benchmark: --quick, --json FILE; prints its table."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args()
    rows = run(options.quick)
    if options.json is not None:
        options.json.write_text(json.dumps([vars(row) for row in rows]))
    print(as_markdown({"": rows}))


def read_rows(path: Path) -> list[Row]:
    """What `run_and_write` wrote; none if it wrote nothing."""
    if not path.is_file():
        return []
    return [Row(**row) for row in json.loads(path.read_text())]


def as_markdown(parts: Mapping[str, Sequence[Row]]) -> str:
    """One table for all parts."""
    lines = ["| part | what | value | ratio | against |", "| --- | --- | ---: | ---: | --- |"]
    for part, rows in parts.items():
        for row in rows:
            ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
            lines.append(f"| {part} | {row.name} | {row.value:.4g} {row.unit} | {ratio} | {row.against} |")
    return "\n".join(lines) + "\n"
