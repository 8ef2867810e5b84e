"""What happens to finished runs: files, table, verdict, exit code. What has to be right before one starts is checked here too."""

import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError
from loadgen.commands.guarded import FAILED, INTERRUPTED, LATE, OK
from loadgen.flags.run import SECRET_FLAGS
from loadgen.output.console import table
from loadgen.output.files import save
from loadgen.output.html.render import render
from loadgen.output.result_json import to_json
from loadgen.output.warnings import warnings
from loadgen.results.request_lines import to_csv
from loadgen.results.result import Result
from loadgen.settings import Output
from loadgen.stats.assertions import judge_all

_REPORT, _CSV = "report.html", "requests.csv"


def deliver(result: Result, output: Output, folder: Path | None) -> int:
    """Show and write one run; its exit code. What was measured is shown even if it cannot be written. Raises OSError."""
    if output.quiet:
        for text in warnings(result):
            print(f"warning: {text}", file=sys.stderr)
    else:
        print(table(result))
    if folder is not None:
        write(result, output, folder)
        if not output.quiet:
            print(f"written to {folder}")
    verdicts = judge_all(output.assertions, [to_json(result)])
    for verdict in verdicts:
        print(
            f"{'met' if verdict.holds else 'NOT MET'}: {verdict.why}", file=sys.stdout if verdict.holds else sys.stderr
        )
    if result.facts.interrupted:
        return INTERRUPTED
    return LATE if result.health.late else FAILED if failed(result) or not all(one.holds for one in verdicts) else OK


def failed(result: Result) -> bool:
    """Requests failed, nothing was answered, or the server kept something."""
    return bool(result.summary.failed) or not result.summary.completed or result.leaked


def write(result: Result, output: Output, folder: Path) -> None:
    """The files that were asked for; those of an earlier run in the same folder go. Raises OSError."""
    for name in (_REPORT, _CSV):
        (folder / name).unlink(missing_ok=True)
    save(result, folder)
    if output.csv:
        (folder / _CSV).write_text(to_csv(result.records))
    if output.html:
        write_html([result], folder / _REPORT, title_of(result))


def title_of(result: Result) -> str:
    """Heading of a report: model and kind of work."""
    return f"{result.facts.model}: {result.facts.workload.partition(':')[0]}"


def write_html(results: Sequence[Result], path: Path, title: str) -> None:
    """One page about these runs. Raises OSError."""
    path.write_text(render(results, title), encoding="utf-8")


def check_writable(out: Path | None, *, empty: bool = False) -> None:
    """Find out before the run, not after it, that its result cannot be written; makes the folder. Raises ConfigError.

    `empty`: it must have nothing in it, where several runs become folders and old ones would be taken for new.
    """
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        taken = empty and any(out.iterdir())
    except OSError as error:
        raise ConfigError(f"--out={str(out)!r}: must be a folder that can be made or written to: {error}") from error
    if not os.access(out, os.W_OK):
        raise ConfigError(f"--out={str(out)!r}: must be a folder that can be written to")
    if taken:
        raise ConfigError(f"--out={str(out)!r}: is not empty; name a new folder, so that no older run is mixed in")


def allow_many_sockets() -> None:
    """Raise the limit of open files as far as it goes: every request under way has a socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """A command line that may be written down."""
    shown: list[str] = []
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        if shown and shown[-1] in SECRET_FLAGS:
            shown.append("***")
        else:
            shown.append(f"{flag}=***" if equals and flag in SECRET_FLAGS else argument)
    return shown
