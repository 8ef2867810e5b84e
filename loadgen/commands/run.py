"""`penstock bench run`: settings in; one measured run, or one beside its baseline; table, files and exit code out."""

import asyncio
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import uvloop

from loadgen.commands.deliver import (
    allow_many_sockets,
    check_writable,
    deliver,
    without_secrets,
    write_html,
)
from loadgen.commands.guarded import guarded
from loadgen.flags.run import parse
from loadgen.measure import Asked, measure
from loadgen.output import compare_table
from loadgen.results.result import Result
from loadgen.server.cluster import started
from loadgen.server.cluster_spec import ClusterSpec, equal_mixed, parse_cluster
from loadgen.settings import RunSettings
from loadgen.stats.compare import compare


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Measure one server, or a cluster and its baseline. The exit code; see `commands.guarded`."""
    return guarded("run", lambda: _run(parse(arguments, environ), arguments, environ))


def _run(settings: RunSettings, arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    prepare(settings, empty=settings.target.baseline)
    command = ("penstock", "bench", "run", *without_secrets(arguments))
    target, output = settings.target, settings.output
    if target.cluster is None:
        return deliver(measured(settings, Asked(url=target.url or "", command=command)), output, output.out)
    spec = parse_cluster(target.cluster)
    systems = [spec, equal_mixed(spec)] if target.baseline else [spec]
    if target.baseline and settings.seed is None:  # both must get the same work
        settings = replace(settings, seed=0)
    results, codes = [], []
    for system in systems:
        folder = None if output.out is None else output.out / str(system) if target.baseline else output.out
        with running(system, settings, folder, environ) as url:
            of_system = replace(settings, target=replace(target, cluster=str(system)))
            result = measured(of_system, Asked(url=url, command=command, title=str(system)))
        codes.append(deliver(result, output, folder))
        results.append(result)
        if result.facts.interrupted:
            raise KeyboardInterrupt
    if target.baseline:
        _compare(results, settings, [str(system) for system in systems])
    return max(codes)


def prepare(settings: RunSettings, *, empty: bool = False) -> None:
    """What has to be right before anything starts; `empty` as in `check_writable`. Raises ConfigError."""
    check_writable(settings.output.out, empty=empty)
    allow_many_sockets()


def measured(settings: RunSettings, asked: Asked) -> Result:
    """One run in an event loop of its own. Raises ConfigError."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure(settings, asked))


@contextmanager
def running(
    system: ClusterSpec, settings: RunSettings, folder: Path | None, environ: Mapping[str, str]
) -> Iterator[str]:
    """A system of our own for as long as the context lasts; its URL. Its logs go to `folder`, if there is one."""
    if not settings.output.quiet:
        print(f"starting {system} ...", file=sys.stderr, flush=True)
    with TemporaryDirectory() as scratch:
        logs = Path(scratch) if folder is None else folder / "logs"
        with started(system, settings.target.cluster_flags, logs, environ) as url:
            yield url


def _compare(results: Sequence[Result], settings: RunSettings, names: Sequence[str]) -> None:
    tested, baseline = results
    if not settings.output.quiet:
        print(f"\n{names[0]} beside {names[1]}, the base:")
        try:
            print(compare_table.table(compare([baseline], [tested], settings.output.goodput), ()))
        except ValueError as error:
            print(f"cannot be compared: {error}")
    out = settings.output.out
    if out is not None and settings.output.html:
        write_html(results, out / "report.html", f"{names[0]} beside {names[1]}")
