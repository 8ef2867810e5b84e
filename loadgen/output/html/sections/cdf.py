"""Distributions of the latencies, all percentiles at once; the axis gives the tail as much room as the body."""

from collections.abc import Sequence

import numpy as np

from loadgen.output.html.run_view import RunView
from loadgen.output.html.section import Figure, Key, Section
from loadgen.output.html.theme import Json, axis, layout, target_line, unit_for
from loadgen.output.html.thin import Numbers, compact
from loadgen.output.html.wording import plot_text, target_text

_SHOWN = (
    ("ttft", "Time to first token (TTFT)"),
    ("tpot", "Time per output token (TPOT)"),
    ("itl", "Inter-token latency (ITL)"),
    ("e2e", "End to end (E2E)"),
)
_MARKED = (0.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9)
_LAST = 99.9
_POINTS = 400


def build(runs: Sequence[RunView]) -> Section | None:
    """None if nothing was answered."""
    figures = [figure for name, title in _SHOWN if (figure := _figure(runs, name, title)) is not None]
    if not figures:
        return None
    return Section(
        name="distributions",
        title="Latency distributions",
        short="Distributions",
        note="Read it as: so many percent of the requests (of the gaps, for ITL) took at most this long. "
        "A curve ends where its samples end.",
        keys=tuple(Key(name=run.name, color=run.color, mark=run.dash) for run in runs) if len(runs) > 1 else (),
        figures=tuple(figures),
    )


def depth(percentiles: Numbers) -> Numbers:
    """Place on an axis where 90, 99 and 99.9 % are evenly spaced: -log10(1 - p)."""
    return -np.log10(1 - percentiles / 100)


def _figure(runs: Sequence[RunView], name: str, title: str) -> Figure | None:
    shown = [run for run in runs if run.latencies_ms[name].size]
    if not shown:
        return None
    factor, unit = unit_for(max(np.percentile(run.latencies_ms[name], _LAST) for run in shown))
    marks = [f"p{mark:g}" if mark else "min" for mark in _MARKED]
    ticks = compact(depth(np.array(_MARKED)), 5)
    across = axis("", tickvals=ticks, ticktext=marks, range=[0, depth(np.array([_LAST]))[0] + 0.03])
    found = layout(across, axis(unit, rangemode="tozero"))
    targets_s = sorted({aim for run in shown if (aim := getattr(run.slo, f"{name}_s", None)) is not None})
    lines = [target_line(target_s * 1e3 * factor, f"target {target_text(target_s)}") for target_s in targets_s]
    found |= {"shapes": [shape for shape, _ in lines], "annotations": [label for _, label in lines]}
    data = [_trace(run, name, factor, unit) for run in shown]
    return Figure(name=f"cdf-{name}", title=title, data=data, layout=found)


def _trace(run: RunView, name: str, factor: float, unit: str) -> Json:
    values_ms = run.latencies_ms[name]
    percentiles = (np.arange(values_ms.size) + 0.5) / values_ms.size * 100
    places = depth(np.minimum(percentiles, _LAST))
    within = percentiles <= _LAST
    # Evenly spaced on the axis, so that the tail keeps every sample and the body loses what cannot be seen.
    wanted = np.linspace(0, places[-1], _POINTS)
    kept = np.unique(np.append(np.searchsorted(places[within], wanted).clip(0, within.sum() - 1), within.sum() - 1))
    percents = [f"{100 * (1 - 10**-place):.4g}" for place in places[kept]]
    return {
        "type": "scatter",
        "mode": "lines+markers" if kept.size < 3 else "lines",
        "name": plot_text(run.name),
        "legendgroup": run.name,
        "x": compact(places[kept], 4),
        "y": compact(values_ms[kept] * factor),
        "text": percents,
        "line": {"color": run.color, "dash": run.dash, "width": 2},
        "hovertemplate": f"p%{{text}}: %{{y:,.4~g}} {unit}<extra>%{{fullData.name}}</extra>",
    }
