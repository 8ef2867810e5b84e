"""What was run: command, server, load, settings, host."""

import shlex
from collections.abc import Mapping, Sequence

from loadgen.output.html.run_view import RunView, load_text
from loadgen.output.html.section import Section, Table
from loadgen.output.html.sections.verdict import slo_text
from loadgen.output.html.wording import plural
from loadgen.results.timeline import ServerView

SAID_ELSEWHERE = frozenset(
    {"url", "model", "endpoint", "seed", "rate", "concurrency", "arrival", "burstiness", "goodput"}
)
"""Settings that other rows show."""


def build(runs: Sequence[RunView]) -> Section:
    """Of the run; of several what they share, as the first has it, and a table of their commands."""
    facts = runs[0].result.facts
    alike = [name for name in facts.settings if len({repr(run.result.facts.settings.get(name)) for run in runs}) == 1]
    settings = {name: facts.settings[name] for name in alike if _shown(name, facts.settings[name])}
    urls = ", ".join(dict.fromkeys(run.result.facts.url for run in runs))
    load = load_text(facts) + (f", {facts.arrival} arrivals" if facts.arrival is not None else "")
    if facts.arrival == "gamma":
        load += f" of burstiness {facts.burstiness:g}"
    rows = [("Command", shlex.join(facts.command))] if len(runs) == 1 else [("Runs", plural(len(runs), "run"))]
    rows += [
        ("Server", f"{urls}, {facts.endpoint}; {_known_of(runs[0].result.server)}"),
        ("Model", facts.model),
        *([("Load", load), ("Seed", str(facts.seed))] if len(runs) == 1 else []),
        ("Workload", facts.workload),
        ("Its lengths", facts.workload_source),
        ("Settings", " · ".join(f"{_flag(name)} {_text(value)}" for name, value in settings.items())),
        ("Targets", slo_text(runs[0].slo) if runs[0].slo is not None else ""),
        ("Host", " · ".join(f"{name} {_text(value)}" for name, value in facts.host.items())),
        ("Date", facts.date),
    ]
    tables = (_commands(runs),) if len(runs) > 1 else ()
    stated = tuple((name, value) for name, value in rows if value)
    return Section(name="run", title="What was run", short="Run", facts=stated, tables=tables)


def _known_of(server: ServerView) -> str:
    told = server.samples or server.before is not None
    return f"state from {server.source}" if told else f"state unknown: {server.source}"


def _commands(runs: Sequence[RunView]) -> Table:
    rows = [(run.name, shlex.join(run.result.facts.command), str(run.result.facts.seed)) for run in runs]
    return Table(head=("Run", "Command", "Seed"), rows=tuple(rows), text_columns=frozenset({0, 1}))


def _shown(name: str, value: object) -> bool:
    return name not in SAID_ELSEWHERE and value not in (None, "", False) and value != {} and value != []


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
