"""Where the time to first token goes, by the server's own clock, and what is different in the slow ones."""

from collections.abc import Sequence

import numpy as np

from loadgen.output.html.run_view import RunView
from loadgen.output.html.section import Figure, Key, Section
from loadgen.output.html.theme import OTHER_PHASES, PHASES, REST, Json, axis, layout, unit_for
from loadgen.output.html.wording import latency, plot_text, plural, share
from loadgen.results.records import RequestRecord

_BUCKETS = (("fastest 50 %", 0.0, 0.5), ("50 to 90 %", 0.5, 0.9), ("90 to 99 %", 0.9, 0.99), ("slowest 1 %", 0.99, 1.0))
_ROW_PX, _EDGE_PX = 40, 60
_REST = "rest"
_Bar = tuple[str, dict[str, float], int]
"""What it shows, mean milliseconds by phase, requests."""


def build(run: RunView, prefix: str = "") -> Section | None:
    """Of one run, by quantile of TTFT; only a note where the server does not tell phases. None without answers."""
    if not run.answered:
        return None
    name, title = f"{prefix}phases", "What the time to first token is made of"
    told = _told(run)
    if not told:
        return Section(name=name, title=title, short="Phases", note="Not shown: the server does not tell phases.")
    told.sort(key=lambda record: record.ttft_s or 0.0)
    bars: list[_Bar] = [("all", means_ms(told), len(told))]
    for text, start, end in _BUCKETS:
        chosen = told[round(start * len(told)) : round(end * len(told))]
        if chosen:
            bars.append((text, means_ms(chosen), len(chosen)))
    silent = len(run.answered) - len(told)
    note = "Mean per request, of requests sorted by TTFT." + (
        f" {plural(silent, 'answer')} told no phases and are left out." if silent else ""
    )
    return _section(name, title, note, bars)


def compare(runs: Sequence[RunView]) -> Section | None:
    """Of several runs, a bar each; None unless one tells phases."""
    bars: list[_Bar] = [(plot_text(run.name), means_ms(told), len(told)) for run in runs if (told := _told(run))]
    if not bars:
        return None
    return _section("phases", "What the time to first token is made of", "Mean per request, by run.", bars)


def means_ms(records: Sequence[RequestRecord]) -> dict[str, float]:
    """Mean of each phase that some record has, and under `rest` what no phase explains of the time to first token."""
    names = dict.fromkeys([*PHASES, *sorted({name for record in records for name in record.phases_ms})])
    found = {name: float(np.mean([record.phases_ms.get(name, 0.0) for record in records])) for name in names}
    found = {name: mean_ms for name, mean_ms in found.items() if mean_ms > 0}
    ttft_ms = float(np.mean([(record.ttft_s or 0.0) * 1e3 for record in records]))
    # Clocks of two machines: phases may add up to a little more than the client saw.
    return found | {_REST: max(0.0, ttft_ms - sum(found.values()))}


def _told(run: RunView) -> list[RequestRecord]:
    return [record for record in run.answered if record.phases_ms and record.ttft_s is not None]


def _section(name: str, title: str, note: str, bars: list[_Bar]) -> Section:
    present = dict.fromkeys(phase for _, means, _ in bars for phase in means if phase != _REST)
    ordered = [phase for phase in PHASES if phase in present] + [phase for phase in present if phase not in PHASES]
    ordered.append(_REST)
    totals_ms = [sum(means.values()) for _, means, _ in bars]
    factor, unit = unit_for(max(totals_ms))
    looks = {phase: _look(phase, ordered) for phase in ordered}
    data = [_trace(bars, phase, looks[phase], factor) for phase in ordered]
    rows = axis(
        "", automargin=True, autorange="reversed", tickformat="", gridcolor="$clear", ticklen=6, tickcolor="$clear"
    )
    across = axis(unit, rangemode="tozero", range=[0, max(totals_ms) * factor * 1.12])
    found = layout(across, rows | {"type": "category"}, barmode="stack", bargap=0.35)
    found["annotations"] = [
        {
            "text": f"<b>{latency(total_ms / 1e3)}</b>",
            "x": total_ms * factor,
            "y": text,
            "showarrow": False,
            "xanchor": "left",
            "xshift": 6,
            "font": {"color": "$ink"},
        }
        for (text, _, _), total_ms in zip(bars, totals_ms, strict=True)
    ]
    figure = Figure(name=name, title="", data=data, layout=found, height_px=_EDGE_PX + _ROW_PX * len(bars))
    keys = tuple(Key(name=text, color=color, mark="bar") for color, text in looks.values())
    return Section(name=name, title=title, short="Phases", note=note, keys=keys, figures=(figure,), columns=1)


def _look(phase: str, ordered: Sequence[str]) -> tuple[str, str]:
    if phase == _REST:
        return REST
    if phase in PHASES:
        return PHASES[phase]
    others = [name for name in ordered if name not in PHASES]
    return OTHER_PHASES[others.index(phase) % len(OTHER_PHASES)], phase.replace("_", " ")


def _trace(bars: Sequence[_Bar], phase: str, look: tuple[str, str], factor: float) -> Json:
    color, text = look
    values_ms = [means.get(phase, 0.0) for _, means, _ in bars]
    parts = [value / max(sum(means.values()), 1e-9) for value, (_, means, _) in zip(values_ms, bars, strict=True)]
    return {
        "type": "bar",
        "orientation": "h",
        "name": plot_text(text),
        "legendgroup": text,
        "y": [label for label, _, _ in bars],
        "x": [round(value_ms * factor, 4) for value_ms in values_ms],
        "text": [
            f"{latency(value_ms / 1e3)}, {share(part)} of {plural(count, 'request')}' mean"
            for value_ms, part, (_, _, count) in zip(values_ms, parts, bars, strict=True)
        ],
        "textposition": "none",
        "marker": {"color": color, "line": {"width": 0}},
        "hovertemplate": "%{text}<extra>%{fullData.name}</extra>",
    }
