"""Turns of a conversation: later ones have longer prompts, and more of them in the cache."""

from collections import defaultdict

import numpy as np

from loadgen.output.html.run_view import RunView
from loadgen.output.html.section import Figure, Key, Section
from loadgen.output.html.theme import Json, axis, layout, unit_for
from loadgen.output.html.thin import compact
from loadgen.results.records import RequestRecord

_MOST_TURNS = 60


def build(run: RunView, prefix: str = "") -> Section | None:
    """None where conversations have one turn."""
    by_turn: defaultdict[int, list[RequestRecord]] = defaultdict(list)
    for record in run.answered:
        by_turn[record.turn].append(record)
    if len(by_turn) < 2:
        return None
    turns = sorted(by_turn)[:_MOST_TURNS]
    figures = [_ttft(by_turn, turns, prefix)]
    cached = _cached(by_turn, turns, prefix)
    if cached is not None:
        figures.append(cached)
    dropped = len(by_turn) - len(turns)
    note = "" if cached is not None else "The server does not tell what it found in its cache. "
    note += f"The last {dropped} turns are not shown." if dropped else ""
    keys = (Key(name="p90", color="$orange"), Key(name="p50", color="$blue"))
    return Section(
        name=f"{prefix}turns", title="By turn", short="Turns", note=note.strip(), keys=keys, figures=tuple(figures)
    )


def _ttft(by_turn: dict[int, list[RequestRecord]], turns: list[int], prefix: str) -> Figure:
    found = {}
    for percent in (90, 50):
        values = [np.percentile([(r.ttft_s or 0.0) * 1e3 for r in by_turn[turn]], percent) for turn in turns]
        found[percent] = np.array(values)
    factor, unit = unit_for(max(found[90]))
    data: list[Json] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": f"p{percent}",
            "legendgroup": f"p{percent}",
            "x": [turn + 1 for turn in turns],
            "y": compact(found[percent] * factor),
            "text": [f"{len(by_turn[turn]):,}" for turn in turns],
            "line": {"color": color, "width": 2},
            "marker": {"size": 7},
            "hovertemplate": f"turn %{{x}}: %{{y:,.4~g}} {unit}, %{{text}} requests<extra>%{{fullData.name}}</extra>",
        }
        for percent, color in ((90, "$orange"), (50, "$blue"))
    ]
    plot = layout(_turn_axis(turns), axis(unit, rangemode="tozero"))
    return Figure(name=f"{prefix}turn-ttft", title="TTFT by turn", data=data, layout=plot)


def _cached(by_turn: dict[int, list[RequestRecord]], turns: list[int], prefix: str) -> Figure | None:
    shares: list[float | None] = []
    for turn in turns:
        told = [record for record in by_turn[turn] if record.cached_tokens is not None]
        prompts = sum(record.prompt_tokens for record in told)
        shares.append(round(sum(r.cached_tokens or 0 for r in told) / prompts, 4) if prompts else None)
    if not any(part is not None for part in shares):
        return None
    trace: Json = {
        "type": "bar",
        "x": [turn + 1 for turn in turns],
        "y": shares,
        "marker": {"color": "$green"},
        "width": 0.55,
        "hovertemplate": "turn %{x}: %{y:.1%}<extra></extra>",
    }
    plot = layout(_turn_axis(turns), axis("", tickformat=".0%", range=[0, 1.02]))
    return Figure(name=f"{prefix}turn-cached", title="Share of the prompt found in cache", data=[trace], layout=plot)


def _turn_axis(turns: list[int]) -> Json:
    ticks: Json = {"tickvals": [turn + 1 for turn in turns]} if len(turns) <= 20 else {}
    return axis("turn", range=[turns[0] + 0.4, turns[-1] + 1.6], gridcolor="$clear", **ticks)
