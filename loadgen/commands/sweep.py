"""`penstock bench sweep`: the same work at several rates, or a search for the highest rate that meets its targets."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from common.errors import ConfigError
from loadgen.commands.deliver import FAILED, OK, title_of, without_secrets, write, write_html
from loadgen.commands.run import guarded, measured, prepare, running
from loadgen.flags import types
from loadgen.flags.run import (
    add_load_flags,
    add_output_flags,
    add_target_flags,
    load_of,
    run_settings,
)
from loadgen.flags.workload import add_workload_flags
from loadgen.measure import Asked
from loadgen.output.sweep_table import sweep_head, sweep_json, sweep_row, sweep_verdict
from loadgen.results.result import Result
from loadgen.schedule.curves import Steady
from loadgen.server.cluster_spec import parse_cluster
from loadgen.settings import RunSettings
from loadgen.stats import sweep as search


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSettings:
    """Which rates, and what every run is."""

    run: RunSettings
    rates: tuple[float, ...] | None
    """None: find the highest."""
    start_rate: float
    attainment: float
    tolerance: float
    max_runs: int


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Measure every rate; exit code 0 if the targets are met somewhere, or if there are none."""
    return guarded("sweep", lambda: _run(parse(arguments, environ), arguments, environ))


def parse(arguments: Sequence[str], environ: Mapping[str, str]) -> SweepSettings:
    """Settings from flags. Raises ConfigError; --help exits."""
    parser = types.Parser(
        prog="penstock bench sweep",
        description="Measure a server at several rates of an open loop, or find the highest one that meets --goodput.",
        epilog="Exit code: 0, or 1 if no rate met the targets; 2 bad settings or no server.",
    )
    add = parser.add_argument_group("sweep").add_argument
    add("--rates", type=types.typed(_rates), metavar="1,2,4", help="requests per second, one run each")
    add("--find-goodput", action="store_true", help="search for the highest rate that meets --goodput")
    add("--start-rate", type=types.above_zero, default=1.0, help="where the search begins [%(default)s]")
    add(
        "--attainment",
        type=types.share,
        default=search.ATTAINMENT,
        help="share of requests that must meet it [%(default)s]",
    )
    add(
        "--tolerance",
        type=types.above_zero,
        default=search.TOLERANCE,
        help="how closely the rate is found [%(default)s]",
    )
    add("--max-runs", type=types.at_least(1), default=search.MAX_RUNS, help="of a search [%(default)s]")
    add_target_flags(parser)
    add_load_flags(parser, with_rate=False)
    add_workload_flags(parser)
    add_output_flags(parser)
    values = parser.parse_args(arguments)
    _check(values)
    load = load_of(values, curve=Steady(values.start_rate), concurrency=None, replay=False)
    return SweepSettings(
        run=run_settings(values, load, environ),
        rates=values.rates,
        start_rate=values.start_rate,
        attainment=values.attainment,
        tolerance=values.tolerance,
        max_runs=values.max_runs,
    )


def _check(values: argparse.Namespace) -> None:
    if (values.rates is None) == (not values.find_goodput):
        raise ConfigError("give --rates (one run each) or --find-goodput (a search): exactly one of them")
    if values.find_goodput and values.goodput is None:
        raise ConfigError("--find-goodput needs --goodput: the targets, such as ttft:500 tpot:50")
    if values.baseline:
        raise ConfigError("--baseline belongs to `bench run`; sweep each system and compare them by `bench report A B`")


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(types.above_zero(part) for part in text.split(","))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{text!r}: must be rates above 0 such as 1,2,4") from error


def _run(settings: SweepSettings, arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    run = settings.run
    prepare(run)
    system = None if run.target.cluster is None else parse_cluster(run.target.cluster)
    with nullcontext(run.target.url or "") if system is None else running(system, run, run.output.out, environ) as url:
        asked = Asked(url=url, command=("penstock", "bench", "sweep", *without_secrets(arguments)))
        results, asking = _measure(settings, asked)
    best = asking.best()
    if not run.output.quiet:
        judged = run.output.goodput is not None
        print(sweep_verdict(best, asking.why_stopped, settings.attainment, with_targets=judged))
    if run.output.out is not None:
        _write(settings, results, best, asking.why_stopped)
    return FAILED if run.output.goodput is not None and best is None else OK


def _measure(settings: SweepSettings, asked: Asked) -> tuple[list[Result], search.Search]:
    """Every point, in the order that the search asks for."""
    asking: search.Search
    if settings.rates is not None:
        asking = search.ListedRates(settings.rates, settings.attainment)
    else:
        asking = search.FindRate(settings.start_rate, settings.attainment, settings.tolerance, settings.max_runs)
    results: list[Result] = []
    if not settings.run.output.quiet:
        print(sweep_head())
    while (rate := asking.next_rate()) is not None:
        result = measured(_at(settings.run, rate, len(results)), replace(asked, title=f"{rate:.3g} req/s"))
        asking.add(_point(result, rate))
        results.append(result)
        if settings.run.output.out is not None:
            write(result, replace(settings.run.output, html=False), _folder(settings, len(results)))
        if not settings.run.output.quiet:
            print(sweep_row(result), flush=True)
    return results, asking


def _at(run: RunSettings, rate: float, number: int) -> RunSettings:
    """The run at that rate; every one has work of its own, so that none finds the cache of another."""
    seed = None if run.seed is None else run.seed + number
    return replace(
        run, load=replace(run.load, curve=Steady(rate)), seed=seed, warmup=run.warmup if number == 0 else _later(run)
    )


def _later(run: RunSettings) -> int | float:
    """Requests that warm a server up are sent once; seconds that do not count are left out of every run."""
    return run.warmup if isinstance(run.warmup, float) else 0


def _point(result: Result, rate: float) -> search.Point:
    found = result.intervals.get("attainment")
    return search.Point(
        rate_per_s=rate,
        attainment=result.summary.attainment or 0.0,
        saturated=result.saturation is not None and result.saturation.detected,
        interval=None if found is None else (found.low, found.high),
        late=result.health.late,
    )


def _folder(settings: SweepSettings, number: int) -> Path:
    assert settings.run.output.out is not None, "only asked for where there is one"
    return settings.run.output.out / f"run-{number:02}"


def _write(settings: SweepSettings, results: Sequence[Result], best: float | None, why: str) -> None:
    out = settings.run.output.out
    assert out is not None, "only called where there is one"
    content = sweep_json(results, best, why, settings.attainment)
    (out / "sweep.json").write_bytes(msgspec.json.format(msgspec.json.encode(content)))
    if settings.run.output.html:
        write_html(results, out / "report.html", title_of(results[0]))
    print(f"written to {out}", file=sys.stderr)
