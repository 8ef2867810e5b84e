"""Results in, one HTML file out, which needs nothing else: no network, no other file. Pure but for its own package's files."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any  # Any: plotly's JSON

import jinja2
import msgspec

from loadgen.output.html.run_view import RunView, views
from loadgen.output.html.section import Section
from loadgen.output.html.sections import (
    cdf,
    curves,
    errors,
    facts,
    groups,
    lengths,
    memory,
    numbers,
    phases,
    timeline,
    turns,
    verdict,
)
from loadgen.results.result import Result

_PACKAGE = "loadgen.output.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chapter:
    """Sections of one run of several, folded away until asked for."""

    title: str
    sections: tuple[Section, ...]


def render(results: Sequence[Result], title: str, *, names: Sequence[str] | None = None) -> str:
    """The page of one run, or of several side by side. `names` of the runs default to their load.

    Raises ValueError without results.
    """
    if not results:
        raise ValueError("a report needs a result")
    runs = views(results, names)
    sections = _one(runs[0]) if len(runs) == 1 else _several(runs)
    chapters = [Chapter(title=run.name, sections=_inside(run, f"run{i}-")) for i, run in enumerate(runs)]
    shown = chapters if len(runs) > 1 else []
    figures = _figures([*sections, *(section for chapter in shown for section in chapter.sections)])
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            verdict=verdict.build(runs),
            sections=sections,
            chapters=shown,
            css=_file("page.css"),
            script=_file("page.js"),
            plotly=_plotly(),
            figures=script_json(figures),
        )
    )


def script_json(value: Any) -> str:
    """JSON that may stand inside a script element: it can neither end the element nor open a comment. Numbers of numpy may be in it."""
    return (
        msgspec.json.encode(value, enc_hook=float)
        .decode()
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
    )


def _one(run: RunView) -> tuple[Section, ...]:
    found = (
        facts.build([run]),
        numbers.build([run]),
        cdf.build([run]),
        *_inside(run, ""),
        errors.build([run]),
    )
    return tuple(section for section in found if section is not None)


def _several(runs: Sequence[RunView]) -> tuple[Section, ...]:
    found = (
        facts.build(runs),
        numbers.build(runs),
        curves.build(runs),
        cdf.build(runs),
        phases.compare(runs),
        errors.build(runs),
    )
    return tuple(section for section in found if section is not None)


def _inside(run: RunView, prefix: str) -> tuple[Section, ...]:
    builders = (timeline.build, memory.build, phases.build, turns.build, lengths.build, groups.build)
    return tuple(section for build in builders if (section := build(run, prefix)) is not None)


def _figures(sections: Sequence[Section]) -> dict[str, Any]:
    every = [figure for section in sections for figure in section.figures]
    return {figure.name: {"data": figure.data, "layout": figure.layout} for figure in every}


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_file),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def _file(name: str) -> str:
    return files(_PACKAGE).joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs  # most commands of the bench draw nothing

    return str(get_plotlyjs())
