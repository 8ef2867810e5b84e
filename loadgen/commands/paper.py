"""`penstock bench paper NAME`: a paper's experiment on this machine, next to the paper's own figures, by one command.

Every cell is one `bench run` on a fresh system, and its command line is in its result: any of them can be repeated alone.
"""

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from common.errors import ConfigError
from loadgen.commands.deliver import check_writable, deliver, write_html
from loadgen.commands.guarded import OK, guarded
from loadgen.commands.run import measured, prepare, running
from loadgen.flags import types
from loadgen.flags.run import cluster_words as words
from loadgen.flags.run import parse as parse_run
from loadgen.measure import Asked
from loadgen.output.paper_table import paper_table
from loadgen.papers.ellm import ELLM
from loadgen.papers.experiment import Experiment, PaperWorkload, System
from loadgen.papers.layerkv import LAYERKV
from loadgen.papers.memserve import MEMSERVE
from loadgen.papers.vtensor import VTENSOR
from loadgen.results.result import Result
from loadgen.server.cluster_spec import parse_cluster

EXPERIMENTS: Mapping[str, Experiment] = {"memserve": MEMSERVE, "vtensor": VTENSOR, "ellm": ELLM, "layerkv": LAYERKV}
_CAPACITY_CONCURRENCY = 8
_Part = TypeVar("_Part", PaperWorkload, System)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperSettings:
    """What to run, and how large."""

    experiment: Experiment
    model: str | None
    requests: int
    capacity_requests: int
    load: float | None
    """None: as the experiment has it."""
    live: int
    scale: float
    seed: int
    rounds: int
    workloads: tuple[PaperWorkload, ...]
    systems: tuple[System, ...]
    cluster_flags: tuple[str, ...]
    out: Path


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run an experiment; the exit code is that of the worst run."""
    return guarded("paper", lambda: _run(parse(arguments), environ))


def parse(arguments: Sequence[str]) -> PaperSettings:
    """Settings from flags. Raises ConfigError; --help exits."""
    parser = types.Parser(
        prog="penstock bench paper",
        description="Repeat a paper's experiment here: its workloads on its systems, with the paper's figures beside.",
    )
    add = parser.add_argument
    add(
        "name",
        choices=sorted(EXPERIMENTS),
        help="memserve: mixed, separated, with caching; vtensor: paged, virtual; ellm: static to elastic; layerkv: by layers",
    )
    add("--out", required=True, metavar="DIR", help="a folder a run, table.md and a report a workload")
    add("--model", help="folder or hub id [a preset of the experiment's, made with random weights]")
    add("--requests", type=types.at_least(1), help="per run; p99 needs 200 [the experiment's]")
    add("--load", type=types.above_zero, help="rate, as a share of what one system can do [the experiment's]")
    add("--capacity-requests", type=types.at_least(1), default=80, help="requests that find that out [%(default)s]")
    add("--live", type=types.at_least(1), default=24, help="conversations that are open at a time [%(default)s]")
    add("--scale", type=types.above_zero, help="factor of all lengths; 1: the data sets' own [the experiment's]")
    add("--seed", type=int, default=0, help="of the work; round k adds k [%(default)s]")
    add("--rounds", type=types.at_least(1), default=1, help="of everything; every other one in reverse [%(default)s]")
    add("--workloads", metavar="NAME,NAME", help="only these")
    add("--systems", metavar="NAME,NAME", help="only these")
    add("--cluster-flags", default="", metavar="FLAGS", help='for every system, such as "--device cuda"')
    values = parser.parse_args(arguments)
    experiment = EXPERIMENTS[values.name]
    return PaperSettings(
        experiment=experiment,
        model=values.model,
        requests=values.requests or experiment.requests,
        capacity_requests=values.capacity_requests,
        load=values.load,
        live=values.live,
        scale=values.scale or experiment.scale,
        seed=values.seed,
        rounds=values.rounds,
        workloads=_chosen(values.workloads, experiment.workloads, "--workloads"),
        systems=_chosen(values.systems, experiment.systems, "--systems"),
        cluster_flags=words(values.cluster_flags),
        out=Path(values.out),
    )


def _chosen(text: str | None, offered: tuple[_Part, ...], flag: str) -> tuple[_Part, ...]:
    if text is None:
        return offered
    names = text.split(",")
    if unknown := [name for name in names if name not in [one.name for one in offered]]:
        raise ConfigError(f"{flag}={text!r}: {unknown[0]!r} is none of {', '.join(one.name for one in offered)}")
    return tuple(one for one in offered if one.name in names)


def _run(settings: PaperSettings, environ: Mapping[str, str]) -> int:
    check_writable(settings.out, empty=True)
    with TemporaryDirectory() as scratch:
        bench = _Bench(settings, settings.model or _make_model(settings.experiment.preset, Path(scratch)), environ)
        try:
            for workload in settings.workloads:
                bench.cross(workload)
        finally:  # what was done counts, also of an experiment that was interrupted
            _deliver(settings, bench)
    return max(bench.codes)


def _deliver(settings: PaperSettings, bench: "_Bench") -> None:
    if not bench.cells:
        return
    table = paper_table(settings.experiment, bench.cells)
    print(table)
    (settings.out / "table.md").write_text(table)
    for workload in settings.workloads:
        results = [result for (name, _), found in bench.cells.items() if name == workload.name for result in found]
        if results:
            title = f"{settings.experiment.paper}: {workload.name}"
            write_html(results, settings.out / f"report-{_in_path(workload.name)}.html", title)
    print(f"written to {settings.out}")


def _in_path(name: str) -> str:
    return name.replace(" ", "-")


def _make_model(preset: str, parent: Path) -> str:
    folder = parent / preset
    command = [sys.executable, "-P", "-m", "services.launcher.cli", "model", "make", "--preset", preset]
    made = subprocess.run([*command, "--out", str(folder)], capture_output=True, text=True, check=False)
    if made.returncode:
        raise ConfigError(f"cannot make a model: {made.stderr.strip()}; name one with --model")
    return str(folder)


def _no_pauses(experiment: Experiment) -> tuple[str, ...]:
    """Conversations whose next turn comes at once."""
    return ("--think-time", "0") if experiment.turns_by_arrivals else ()


class _Bench:
    """Runs the cells of one experiment and keeps what came of them."""

    def __init__(self, settings: PaperSettings, model: str, environ: Mapping[str, str]) -> None:
        self._settings, self._model, self._environ = settings, model, environ
        self.cells: dict[tuple[str, str], list[Result]] = {}
        """By (workload, system), one result a round."""
        self.codes = [OK]
        self._capacities: dict[str, float] = {}

    def cross(self, workload: PaperWorkload) -> None:
        """One workload on every system, so often."""
        rate = None if self._settings.experiment.rhythm is not None else self._rate(workload)
        for round_ in range(self._settings.rounds):
            systems = self._settings.systems if round_ % 2 == 0 else self._settings.systems[::-1]
            for system in systems:
                self._cell(workload, system, rate, round_)

    def _rate(self, workload: PaperWorkload) -> float:
        """Requests per second that every system gets: a share of what one system answers when it never rests."""
        experiment = self._settings.experiment
        system = experiment.system(experiment.capacity_of)
        load = self._settings.load or workload.load or experiment.load
        key = shlex.join(workload.flags)
        if key not in self._capacities:
            rhythm = (
                "--concurrency",
                str(_CAPACITY_CONCURRENCY),
                "--num-requests",
                str(self._settings.capacity_requests),
            )
            flags = self._flags(workload, system, 0, (*rhythm, *_no_pauses(experiment)))
            result = self._measured(flags, system, None, f"{workload.name}: what {system.name} can do")
            steady = result.summary.steady
            self._capacities[key] = result.summary.requests_per_s if steady is None else steady.requests_per_s
        return load * self._capacities[key]

    def _cell(self, workload: PaperWorkload, system: System, rate: float | None, round_: int) -> None:
        title, folder = (
            f"{workload.name}: {system.name}",
            self._settings.out / _in_path(f"{workload.name}-{system.name}-{round_}"),
        )
        count = ("--num-requests", str(self._settings.requests), "--warmup", "8")
        label = ("--label", f"system={system.name}")
        flags = self._flags(workload, system, round_, (*self._rhythm(rate), *count, *label))
        result = self._measured(flags, system, folder, title)
        print(f"\n{title}")
        self.codes.append(deliver(result, parse_run(flags, {}).output, folder))
        self.cells.setdefault((workload.name, system.name), []).append(result)

    def _rhythm(self, rate: float | None) -> tuple[str, ...]:
        experiment = self._settings.experiment
        if rate is None:
            return experiment.rhythm or ()
        turns = ("--turns-by", "arrivals", "--live", str(self._settings.live)) if experiment.turns_by_arrivals else ()
        return ("--rate", f"{rate:.4g}", *turns)

    def _flags(self, workload: PaperWorkload, system: System, round_: int, rest: Sequence[str]) -> list[str]:
        """Of `bench run`, whole: this command alone repeats the cell."""
        settings = self._settings
        up = shlex.join(("--model", self._model, *system.flags, *settings.cluster_flags))
        scale = ("--scale-isl", f"{settings.scale:g}", "--scale-osl", f"{settings.scale:g}")
        seed = ("--seed", str(settings.seed + round_))
        return [
            "--cluster",
            system.cluster,
            "--cluster-flags",
            up,
            *workload.flags,
            *scale,
            *seed,
            *settings.experiment.flags,
            *rest,
        ]

    def _measured(self, flags: Sequence[str], system: System, folder: Path | None, title: str) -> Result:
        run = parse_run(flags, {})
        prepare(run)
        with running(parse_cluster(system.cluster), run, folder, self._environ) as url:
            result = measured(run, Asked(url=url, command=("penstock", "bench", "run", *flags), title=title))
        if result.facts.interrupted:
            raise KeyboardInterrupt
        return result
