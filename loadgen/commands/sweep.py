"""`penstock bench sweep`: the same work at several rates, or a search for the highest rate that meets its targets."""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import msgspec

from common.errors import ConfigError
from loadgen.commands.deliver import title_of, without_secrets, write, write_html
from loadgen.commands.guarded import FAILED, LATE, OK, guarded
from loadgen.commands.run import measured, prepare, running
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
        epilog="Exit code: 0; 1 no rate met the targets, a rate was answered nothing, or the server leaked; 2 bad settings or "
        "no server; 3 the generator was late at every rate.",
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
    if values.find_goodput and values.max_concurrency is not None:
        raise ConfigError("--max-concurrency with --find-goodput hides overload: what is held back misses no target")
    if values.asserts:
        raise ConfigError("--assert belongs to `bench run` and `bench compare`: of which rate should it hold?")
    if values.attainment == 0:
        raise ConfigError("--attainment=0: must be above 0, and up to 1")
    if values.start_rate > types.MOST_PER_S:
        raise ConfigError(f"--start-rate={values.start_rate:g}: must be at most {types.MOST_PER_S:g}")
    if values.baseline:
        raise ConfigError("--baseline belongs to `bench run`; sweep each system and compare them by `bench report A B`")


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(types.above_zero(part) for part in text.split(","))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{text!r}: must be rates above 0 such as 1,2,4") from error


def _run(settings: SweepSettings, arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    run = settings.run
    prepare(run, empty=True)
    system = None if run.target.cluster is None else parse_cluster(run.target.cluster)
    sweep = _Sweep(settings)
    with nullcontext(run.target.url or "") if system is None else running(system, run, run.output.out, environ) as url:
        asked = Asked(url=url, command=("penstock", "bench", "sweep", *without_secrets(arguments)))
        try:
            sweep.measure(asked)
        finally:  # what was measured before something went wrong is worth having
            sweep.write()
    return sweep.exit_code


class _Sweep:
    """Measures point after point, and keeps what came of it."""

    def __init__(self, settings: SweepSettings) -> None:
        self._settings, self._output = settings, settings.run.output
        self._results: list[Result] = []
        self._asking: search.Search
        if settings.rates is not None:
            self._asking = search.ListedRates(settings.rates, settings.attainment)
        else:
            self._asking = search.FindRate(
                settings.start_rate, settings.attainment, settings.tolerance, settings.max_runs
            )

    def measure(self, asked: Asked) -> None:
        """Every point, in the order that the search asks for. Raises ConfigError."""
        self._say(sweep_head())
        while (rate := self._asking.next_rate()) is not None:
            at = _at(self._settings.run, rate, len(self._results))
            result = measured(at, replace(asked, title=f"{rate:.3g} req/s"))
            self._results.append(result)
            self._asking.add(_point(result, rate))
            if self._output.out is not None:
                folder = self._output.out / f"run-{len(self._results):02}"
                write(result, replace(self._output, html=False), folder)
            self._say(sweep_row(result))
            if result.facts.interrupted:
                raise KeyboardInterrupt
        judged = self._output.goodput is not None
        attainment = self._settings.attainment
        self._say(sweep_verdict(self._asking.best(), self._asking.why_stopped, attainment, with_targets=judged))

    def write(self) -> None:
        """The summary and the page about all runs so far. Raises OSError."""
        out, results = self._output.out, self._results
        if out is None or not results:
            return
        content = sweep_json(results, self._asking.best(), self._asking.why_stopped, self._settings.attainment)
        (out / "sweep.json").write_bytes(msgspec.json.format(msgspec.json.encode(content)))
        if self._output.html:
            write_html(results, out / "report.html", title_of(results[0]))
        self._say(f"written to {out}")

    @property
    def exit_code(self) -> int:
        """Overload is what a sweep looks for: failed requests alone are no failure, a rate without an answer is."""
        if all(result.health.late for result in self._results):
            return LATE
        silent = any(not result.summary.completed for result in self._results)
        leaked = any(result.leaked for result in self._results)
        missed = self._output.goodput is not None and self._asking.best() is None
        return FAILED if silent or leaked or missed else OK

    def _say(self, text: str) -> None:
        if not self._output.quiet:
            print(text, flush=True)


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
        saturated=result.saturated,
        interval=None if found is None else (found.low, found.high),
        late=result.health.late,
    )
