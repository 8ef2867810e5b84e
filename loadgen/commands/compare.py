"""`penstock bench compare`: folders of results in; a table of both sides and an exit code out."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from common.errors import ConfigError
from loadgen.commands.guarded import FAILED, OK, guarded
from loadgen.flags.types import Parser
from loadgen.output import compare_table
from loadgen.output.files import load
from loadgen.output.result_json import to_json
from loadgen.results.metrics import Slo
from loadgen.results.result import Result
from loadgen.stats.assertions import Assertion, Verdict, judge_all, parse_all
from loadgen.stats.compare import Comparison, compare

_FORMATS = ("table", "markdown", "json")


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Compare and print. Exit code 0; 1: an assertion fails; 2: bad input."""
    return guarded("compare", lambda: _compare(parser().parse_args(arguments)))


def _compare(values: Namespace) -> int:
    assertions = parse_all(values.assertions, with_base=True)
    base_folders, other_folders = _sides(values.folders, values.base, values.other)
    base, other = ([load(Path(folder)) for folder in side] for side in (base_folders, other_folders))
    comparison, verdicts = compared(base, other, assertions)
    print(shown(comparison, verdicts, values.format))
    return OK if all(verdict.holds for verdict in verdicts) else FAILED


def compared(
    base: Sequence[Result], other: Sequence[Result], assertions: Sequence[Assertion]
) -> tuple[Comparison, list[Verdict]]:
    """Both sides by the base's targets, and the gates on the other side's numbers. Raises ConfigError."""
    values, base_values = ([to_json(run) for run in side] if assertions else [] for side in (other, base))
    try:
        return compare(base, other, targets(base[0])), judge_all(assertions, values, base_values)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def targets(run: Result) -> Slo | None:
    """The targets that a run was judged by; None: it had none. Raises ConfigError if they cannot be read."""
    try:
        return msgspec.convert(run.facts.settings.get("goodput"), Slo | None)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the base's settings: goodput: {error}") from error


def shown(comparison: Comparison, verdicts: Sequence[Verdict], form: str) -> str:
    """The comparison as one of `table`, `markdown` and `json`."""
    if form == "json":
        return msgspec.json.format(msgspec.json.encode(compare_table.to_json(comparison, verdicts))).decode()
    write = compare_table.markdown if form == "markdown" else compare_table.table
    return write(comparison, verdicts)


def _sides(folders: Sequence[str], base: Sequence[str], other: Sequence[str]) -> tuple[list[str], list[str]]:
    if len(folders) not in (0, 2):
        raise ConfigError(f"{' '.join(folders)}: give BASE and OTHER, or groups with --base DIR.. --other DIR..")
    sides = [*folders[:1], *base], [*folders[1:], *other]
    if not all(sides):
        raise ConfigError("each side needs a folder: give BASE and OTHER, or groups with --base DIR.. --other DIR..")
    for side in sides:
        if len(set(map(Path, side))) < len(side):
            raise ConfigError(f"{' '.join(side)}: a run counts once on a side")
    return sides


def parser() -> Parser:
    """Of the command's flags."""
    made = Parser(
        prog="penstock bench compare",
        description="Compare two runs, or two groups of runs, number by number with 95 % intervals.",
        epilog="Exit code: 0, 1 an assertion fails, 2 bad input.",
    )
    add = made.add_argument
    add("folders", nargs="*", metavar="BASE OTHER", help="two folders that `penstock bench run --out` wrote")
    add("--base", nargs="+", action="extend", default=[], metavar="DIR", help="runs of the base side")
    add("--other", nargs="+", action="extend", default=[], metavar="DIR", help="runs of the other side")
    add(
        "--assert",
        dest="assertions",
        action="append",
        default=[],
        metavar="TEXT",
        help="gate on the other side, such as p99_ttft_ms<800 or, against the base, p99_ttft_ms<1.1x; may be repeated; of several runs the mean counts",
    )
    add("--format", choices=_FORMATS, default="table", help="[%(default)s]")
    return made
