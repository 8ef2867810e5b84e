"""Turns of a conversation: later ones have longer prompts, and more of them in the cache."""

from collections.abc import Sequence

import numpy as np

from loadgen.output.html.run_view import RunView
from loadgen.output.html.section import Figure, Key, Section
from loadgen.output.html.theme import Json, axis, layout, unit_for
from loadgen.output.html.thin import compact
from loadgen.results.buckets import Bucket, by_turn
from loadgen.results.metrics import samples_needed

_MOST_TURNS = 60
_COLORS = {90: "$orange", 50: "$blue"}


def build(run: RunView, prefix: str = "") -> Section | None:
    """None where conversations have one turn."""
    answered = [part for part in by_turn(run.result.records) if part.answered]
    if len(answered) < 2:
        return None
    turns = answered[:_MOST_TURNS]
    ttft, cached = _ttft(turns, prefix), _cached(turns, prefix)
    notes = []
    if ttft is None:
        notes.append(f"No turn has the {samples_needed(50)} answers that a median needs.")
    if cached is None:
        notes.append("The server does not tell what it found in its cache.")
    if len(answered) > len(turns):
        notes.append(f"The last {len(answered) - len(turns)} turns are not shown.")
    return Section(
        name=f"{prefix}turns",
        title="By turn",
        short="Turns",
        note=" ".join(notes),
        keys=()
        if ttft is None
        else tuple(Key(name=trace["name"], color=trace["line"]["color"]) for trace in ttft.data),
        figures=tuple(figure for figure in (ttft, cached) if figure is not None),
    )


def _ttft(turns: Sequence[Bucket[int]], prefix: str) -> Figure | None:
    """None if no turn has enough answers for a percentile; a turn that has too few is a gap."""
    values_s = {
        percent: np.array([part.ttft.trusted_s(percent) if part.ttft else None for part in turns], dtype=np.float64)
        for percent in _COLORS
    }
    known_ms = {percent: found * 1e3 for percent, found in values_s.items() if not np.isnan(found).all()}
    if not known_ms:
        return None
    factor, unit = unit_for(max(float(np.nanmax(found)) for found in known_ms.values()))
    data: list[Json] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": f"p{percent}",
            "legendgroup": f"p{percent}",
            "x": [part.key + 1 for part in turns],
            "y": compact(found * factor),
            "text": [f"{part.answered:,}" for part in turns],
            "line": {"color": _COLORS[percent], "width": 2},
            "marker": {"size": 7},
            "hovertemplate": f"turn %{{x}}: %{{y:,.4~g}} {unit}, %{{text}} requests<extra>%{{fullData.name}}</extra>",
        }
        for percent, found in known_ms.items()
    ]
    plot = layout(_turn_axis(turns), axis(unit, rangemode="tozero"))
    return Figure(name=f"{prefix}turn-ttft", title="TTFT by turn", data=data, layout=plot)


def _cached(turns: Sequence[Bucket[int]], prefix: str) -> Figure | None:
    if all(part.cached_share is None for part in turns):
        return None
    trace: Json = {
        "type": "bar",
        "x": [part.key + 1 for part in turns],
        "y": [None if part.cached_share is None else round(part.cached_share, 4) for part in turns],
        "marker": {"color": "$green"},
        "width": 0.55,
        "hovertemplate": "turn %{x}: %{y:.1%}<extra></extra>",
    }
    plot = layout(_turn_axis(turns), axis("", tickformat=".0%", range=[0, 1.02]))
    return Figure(name=f"{prefix}turn-cached", title="Share of the prompt found in cache", data=[trace], layout=plot)


def _turn_axis(turns: Sequence[Bucket[int]]) -> Json:
    ticks: Json = {"tickvals": [part.key + 1 for part in turns]} if len(turns) <= 20 else {}
    return axis("turn", range=[turns[0].key + 0.4, turns[-1].key + 1.6], gridcolor="$clear", **ticks)
