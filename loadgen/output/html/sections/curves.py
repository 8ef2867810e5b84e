"""Several runs against their load: how latency grows with rate and throughput, and where targets are missed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadgen.output.html.run_view import RunView, load_text
from loadgen.output.html.section import Figure, Key, Section
from loadgen.output.html.theme import Json, axis, layout, run_style, target_line, unit_for
from loadgen.output.html.wording import plot_text, target_text
from loadgen.results.metrics import P99_NEEDS_SAMPLES, samples_needed

_ATTAINMENT_WANTED = 0.9
_NAMES = {"ttft": "TTFT", "tpot": "TPOT"}


@dataclass(frozen=True, slots=True)
class Load:
    """What stands on the load axis."""

    title: str
    of: Callable[[RunView], float]


def load_axis(runs: Sequence[RunView]) -> Load:
    """The rate or the concurrency asked for; what was reached, where runs differ in kind or ask for all at once."""
    facts = [run.result.facts for run in runs]
    if all(one.request_rate is not None and one.request_rate < float("inf") for one in facts):
        return Load("requests per second", lambda run: run.result.facts.request_rate or 0.0)
    if all(one.request_rate is None and one.max_concurrency is not None for one in facts):
        return Load("requests at a time", lambda run: float(run.result.facts.max_concurrency or 0))
    return Load("requests per second, reached", lambda run: run.result.summary.requests_per_s)


def build(runs: Sequence[RunView]) -> Section | None:
    """None where nothing was run under two loads."""
    if len({(run.kind, load_text(run.result.facts)) for run in runs}) == len({run.kind for run in runs}):
        return None
    load, tail = load_axis(runs), tail_percent(runs)
    tokens = Load("output tokens per second", lambda run: run.result.summary.output_tokens_per_s)
    figures = [
        *(_latency(runs, load, name, tail) for name in _NAMES),
        *(_latency(runs, tokens, name, tail) for name in _NAMES),
    ]
    if any(run.slo is not None for run in runs):
        figures += [_goodput(runs, load), _attainment(runs, load)]
    kinds = list(dict.fromkeys(run.kind for run in runs))
    keys = [Key(name=kind, color=run_style(i)[0]) for i, kind in enumerate(kinds)] if len(kinds) > 1 else []
    color = "$muted" if len(kinds) > 1 else "$blue"
    keys += [Key(name=f"p{tail}", color=color), Key(name="p50", color=color, mark="dot")]
    note = "" if tail == 99 else f"p99 needs {P99_NEEDS_SAMPLES} answers, and a run has fewer: p{tail} is shown"
    if note:
        fewest = min(len(run.answered) for run in runs)
        note += "." if fewest >= samples_needed(tail) else f", from {samples_needed(tail)} answers on."
    marks = [
        *(
            ["Hollow: saturated, the numbers grow with the length of the run."]
            if any(r.saturated for r in runs)
            else []
        ),
        *(["Crossed: the generator was late."] if any(run.late for run in runs) else []),
    ]
    text = " ".join([note, *marks]).strip()
    return Section(
        name="curves", title="Latency against load", short="Load", note=text, keys=tuple(keys), figures=tuple(figures)
    )


def tail_percent(runs: Sequence[RunView]) -> int:
    """99 if every run that has answers has enough of them, else 90."""
    sizes = [len(run.answered) for run in runs if run.answered]
    return 99 if sizes and min(sizes) >= P99_NEEDS_SAMPLES else 90


def _by_kind(runs: Sequence[RunView], load: Load) -> list[tuple[str, str, list[RunView]]]:
    """Kind, colour, and its runs by load."""
    kinds = list(dict.fromkeys(run.kind for run in runs))
    return [
        (kind, run_style(i)[0], sorted((run for run in runs if run.kind == kind), key=load.of))
        for i, kind in enumerate(kinds)
    ]


def _line(chosen: Sequence[RunView], load: Load, y: Sequence[float | None], color: str, group: str) -> Json:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plot_text(group),
        "legendgroup": group,
        "x": [round(load.of(run), 4) for run in chosen],
        "y": [None if value is None else round(value, 4) for value in y],
        "text": [plot_text(run.name) for run in chosen],
        "line": {"color": color, "width": 2},
        "marker": {
            "size": 9,
            "symbol": [_symbol(run) for run in chosen],
            "color": color,
            "line": {"color": color, "width": 2},
        },
        "connectgaps": False,
    }


def _symbol(run: RunView) -> str:
    return "x-open" if run.late else "circle-open" if run.saturated else "circle"


def _latency(runs: Sequence[RunView], load: Load, name: str, tail: int) -> Figure:
    highest_ms = [value for run in runs if (value := run.percentile_ms(name, tail)) is not None]
    factor, unit = unit_for(max(highest_ms, default=0.0))
    data = []
    for kind, color, chosen in _by_kind(runs, load):
        for percent in (tail, 50):
            values = [None if (v := run.percentile_ms(name, percent)) is None else v * factor for run in chosen]
            trace = _line(chosen, load, values, color, kind)
            trace["line"]["dash"] = "solid" if percent == tail else "dot"
            trace["meta"] = f"p{percent}"
            trace["hovertemplate"] = f"%{{text}}<br>p{percent} %{{y:,.4~g}} {unit} at %{{x:,.4~g}}<extra></extra>"
            data.append(trace)
    plot = layout(axis(load.title, rangemode="tozero"), axis(unit, rangemode="tozero"))
    targets_s = sorted({target for run in runs if (target := getattr(run.slo, f"{name}_s", None)) is not None})
    lines = [target_line(target_s * 1e3 * factor, f"target {target_text(target_s)}") for target_s in targets_s]
    plot |= {"shapes": [shape for shape, _ in lines], "annotations": [label for _, label in lines]}
    against = "throughput" if "tokens" in load.title else "load"
    return Figure(name=f"curve-{name}-{against}", title=f"{_NAMES[name]} against {against}", data=data, layout=plot)


def _goodput(runs: Sequence[RunView], load: Load) -> Figure:
    data = []
    for kind, color, chosen in _by_kind(runs, load):
        trace = _line(chosen, load, [run.result.summary.goodput_per_s for run in chosen], color, kind)
        trace["hovertemplate"] = "%{text}<br>%{y:,.4~g} good requests per second<extra></extra>"
        data.append(trace)
    plot = layout(axis(load.title, rangemode="tozero"), axis("per second", rangemode="tozero"))
    return Figure(name="curve-goodput", title="Goodput: requests within all targets", data=data, layout=plot)


def _attainment(runs: Sequence[RunView], load: Load) -> Figure:
    data = []
    for kind, color, chosen in _by_kind(runs, load):
        trace = _line(chosen, load, [run.attainment for run in chosen], color, kind)
        trace["hovertemplate"] = "%{text}<br>%{y:.1%} within all targets<extra></extra>"
        data.append(trace)
    plot = layout(axis(load.title, rangemode="tozero"), axis("", tickformat=".0%", range=[0, 1.05]))
    shape, label = target_line(_ATTAINMENT_WANTED, "90 %")
    plot |= {"shapes": [shape], "annotations": [label]}
    return Figure(name="curve-attainment", title="Attainment: share within all targets", data=data, layout=plot)
