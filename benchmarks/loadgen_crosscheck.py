"""The same run by `penstock bench`, GuideLLM and AIPerf in turn: do their numbers agree, and with the server's own?

    python -m benchmarks.loadgen_crosscheck [--guidellm PROGRAM] [--aiperf PROGRAM] [--server scripted|penstock|URL] [--rounds 3]

Against a server that keeps a timetable and tells what it really sent (`scripted`), a whole Penstock with a model of
random weights (its gateway's metrics tell means), or any server at a URL. A closed loop of 8 and an open loop with constant
gaps; the tools take turns within each round, because servers change their speed. Target: our figures within 3 % of what
the server says, and of each peer where definitions agree; docs/benchmarks/loadgen.md says where they do not.

PROGRAM: `python3 -m venv V && V/bin/pip install guidellm` (or `aiperf`) leaves V/bin/guidellm.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks._loadgen_tools import Figures, Load, Target, Tool, aiperf, guidellm, penstock, penstock_by_text
from benchmarks._loadgen_witness import PenstockWitness, ScriptedWitness, Told, Witness
from benchmarks._scripted_truth import scripted_server
from benchmarks._serving import serving
from services.worker.model.make import main as make_model

TARGET = 0.03
_POOL_BYTES = 256 << 20


@dataclass(frozen=True)
class Row:
    """One run of one tool."""

    round: int
    tool: str
    cpu_s: float
    """Of the tool with all its processes and its start."""
    figures: Figures
    told: Told | None
    """By the server of the same run; None: a server at a URL says nothing that could be read."""
    load_average: float

    def over_server(self, name: str) -> float | None:
        """A figure over the server's own."""
        return None if self.told is None else _ratio(self.figures, self.told.figures, name)


def _ratio(above: Figures, below: Figures, name: str) -> float | None:
    value, unit = getattr(above, name), getattr(below, name)
    return None if value is None or not unit else value / unit


@contextmanager
def _target(options: argparse.Namespace, tokenizer: Path, folder: Path) -> Iterator[tuple[Target, Witness | None]]:
    if options.server == "scripted":
        timing = {"ttft_ms": options.ttft_ms, "itl_ms": options.itl_ms, "jitter": options.jitter}
        with scripted_server(**timing, tokens_per_chunk=options.tokens_per_chunk) as server:
            yield Target(server.url, server.model, tokenizer), ScriptedWitness(server)
    elif options.server == "penstock":
        flags = {"device_memory": _POOL_BYTES}
        with serving(folder / "system", options.model or tokenizer, {"decode": flags, "prefill": flags}) as system:
            yield Target(system.url, "m", tokenizer), PenstockWitness(system)
    else:
        yield Target(options.server, options.model_name, tokenizer), None


def _one(tool: Tool, load: Load, target: Target, witness: Witness | None, number: int, folder: Path) -> Row:
    if witness is not None:
        witness.forget()
    figures, cpu_s = tool.run(load, target, folder)
    told = None if witness is None else witness.tell()
    return Row(number, tool.name, cpu_s, figures, told, os.getloadavg()[0])


def _table(load: Load, tools: Sequence[Tool], rows: Sequence[Row]) -> str:
    """Medians over the rounds: each tool's figure, over the server's own of the same run, over ours of the same round."""
    by_tool: Mapping[str, list[Row]] = {tool.name: [row for row in rows if row.tool == tool.name] for tool in tools}
    ours = {row.round: row.figures for row in by_tool["penstock"]}
    lines = [f"\n{load}; medians of {len(ours)} rounds", f"{'':20}"]
    for tool in tools:
        lines[-1] += f"{tool.name:>12}{'/server':>8}" + ("" if tool.name == "penstock" else f"{'/ours':>8}")
    for name in Figures.names():
        line = f"{name:20}"
        for tool in tools:
            found = by_tool[tool.name]
            line += _cell([getattr(row.figures, name) for row in found], 12, 2)
            line += _cell([row.over_server(name) for row in found], 8, 3)
            if tool.name != "penstock":
                line += _cell([_ratio(row.figures, ours[row.round], name) for row in found], 8, 3)
        lines.append(line)
    return "\n".join([*lines, *(_footnote(load, tool, by_tool[tool.name]) for tool in tools)])


def _footnote(load: Load, tool: Tool, rows: Sequence[Row]) -> str:
    loads = [row.load_average for row in rows]
    text = f"{tool.name} {tool.version}: {statistics.median(row.cpu_s for row in rows):.1f} s of CPU a run"
    text += f", load average {min(loads):.1f} to {max(loads):.1f}"
    told = [row.told for row in rows if row.told is not None]
    if told and told[0].connections is not None:
        text += f", {told[0].connections} connections"
    late_ms = [one.lateness_p99_ms for one in told if one.lateness_p99_ms is not None]
    text += f", server late by {statistics.median(late_ms):.2f} ms at p99" if late_ms else ""
    empty_ms = [one.turnaround_ms for one in told if one.turnaround_ms is not None]
    if empty_ms and load.concurrency is not None:
        text += f", {statistics.median(empty_ms):.1f} ms between a request's end and the next on its place"
    return text


def _cell(values: Sequence[float | None], width: int, digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):{width}.{digits}f}" if known else f"{'-':>{width}}"


def _worst(rows: Sequence[Row]) -> str:
    """Our largest deviation from what the server says, medians over rounds."""
    off: dict[str, float] = {}
    for name in Figures.names():
        found = [row.over_server(name) for row in rows if row.tool == "penstock"]
        known = [value - 1 for value in found if value is not None]
        if known:
            off[name] = statistics.median(known)
    if not off:
        return ""
    worst = max(off, key=lambda name: abs(off[name]))
    verdict = "within" if abs(off[worst]) <= TARGET else "beyond"
    return f"ours and the server differ most in {worst}: {off[worst]:+.1%}, {verdict} the target of {TARGET:.0%}"


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--guidellm", type=Path, help="its program; left out: not compared")
    add("--aiperf", type=Path, help="its program; left out: not compared")
    add("--server", default="scripted", help="scripted, penstock or a URL")
    add("--model", type=Path, help="model folder for penstock; left out: a tiny one is made")
    add("--model-name", default="m", help="what a server at a URL calls its model")
    add("--endpoint", choices=("completions", "chat"), default="completions")
    add("--rounds", type=int, default=3)
    add("--concurrency", type=int, default=8)
    add("--rate", type=float, default=10.0, help="of the open loop; 0: none")
    add("--requests", type=int, default=64)
    add("--isl", type=int, default=128)
    add("--osl", type=int, default=64)
    add("--ttft-ms", type=float, default=50.0, help="of the scripted server, as the next three")
    add("--itl-ms", type=float, default=10.0)
    add("--jitter", type=float, default=0.2)
    add("--tokens-per-chunk", type=int, default=1)
    add("--json", type=Path)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Print a table per load, and write every run as JSON where asked to."""
    options = _arguments(argv)
    tools = [penstock()] if options.server == "scripted" else [penstock(), penstock_by_text()]
    tools += [guidellm(options.guidellm.absolute())] if options.guidellm else []
    tools += [aiperf(options.aiperf.absolute())] if options.aiperf else []
    shape = (options.requests, options.isl, options.osl, options.endpoint)
    loads = [Load(options.concurrency, None, *shape)] if options.concurrency else []
    loads += [Load(None, options.rate, *shape)] if options.rate else []
    kept: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(["--preset", "tiny", "--out", str(folder / "tiny")])
        with _target(options, folder / "tiny", folder) as (target, witness):
            for at, load in enumerate(loads):
                rows = [
                    _one(tool, load, target, witness, number, folder / f"run-{at}-{number}-{tool.name}")
                    for number in range(options.rounds)
                    for tool in tools
                ]
                print(_table(load, tools, rows), _worst(rows), sep="\n", flush=True)
                kept += [{"load": asdict(load), **asdict(row)} for row in rows]
    if options.json is not None:
        options.json.write_text(json.dumps(kept, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
