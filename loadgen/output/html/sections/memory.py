"""Who had which memory over time: one plot per process and tier, its owners on top of each other."""

from collections.abc import Mapping, Sequence

import numpy as np

from common.units import GIB, MIB, format_bytes
from loadgen.output.html.run_view import RunView
from loadgen.output.html.section import Figure, Key, Section, Table
from loadgen.output.html.theme import MEMORY_OWNERS, OTHER_OWNERS, Json, axis, layout
from loadgen.output.html.thin import Numbers, compact, thin
from loadgen.output.html.wording import plot_text
from loadgen.results.memory_use import memory_use, told
from loadgen.results.timeline import ServerSample

_HEIGHT_PX = 210
_MOST_FIGURES = 32
_FREE = "free"
_TIERS = {"device": 0, "host": 1, "disk": 2}
_Place = tuple[str, str]


def build(run: RunView, prefix: str = "") -> Section | None:
    """Of one run; None if the server does not tell. `prefix` keeps names on the page apart."""
    samples = told(run.result.server.samples)
    found = {(name, tier) for sample in samples for name, tiers in sample.memory.items() for tier in tiers}
    places = sorted(found, key=lambda place: (place[0], _TIERS.get(place[1], len(_TIERS)), place[1]))
    if not places:
        return None
    shown = places[:_MOST_FIGURES]
    figures = [_figure(f"{prefix}memory{at}", place, samples) for at, place in enumerate(shown)]
    return Section(
        name=f"{prefix}memory",
        title="Memory",
        short="Memory",
        note=_note(len(places) - len(shown)),
        keys=_keys(figures),
        figures=tuple(figures),
        columns=1 if len(figures) == 1 else 2,
        tables=(_table(samples),),
    )


def _note(n_left_out: int) -> str:
    told_by = "As the workers reported it, twice a second. Memory of the device is the worker's own, on a CPU too."
    return f"{told_by} {n_left_out} more are in timeline.jsonl." if n_left_out else told_by


def _keys(figures: Sequence[Figure]) -> tuple[Key, ...]:
    """One for each kind of owner, in the order in which they stand on each other."""
    colors = {trace["legendgroup"]: trace["fillcolor"] for figure in figures for trace in figure.data}
    known = [name for name in dict.fromkeys(name for _, name in MEMORY_OWNERS.values()) if name in colors]
    ordered = [*known, *sorted(colors.keys() - set(known))]
    return tuple(Key(name=name, color=colors[name], mark="bar") for name in ordered)


def _figure(name: str, place: _Place, samples: Sequence[ServerSample]) -> Figure:
    worker, tier = place
    rows = [sample.memory.get(worker, {}).get(tier, {}) for sample in samples]
    series = _series(rows)
    largest_bytes = max(sum(row.values()) for row in rows)
    scale, unit = (GIB, "GiB") if largest_bytes >= GIB else (MIB, "MiB")
    held = [sum(n_bytes for owner, n_bytes in row.items() if _look(owner)[1] != _FREE) for row in rows]
    kept = thin(np.asarray(held, dtype=np.float64))  # the same places for all: they stand on each other
    at_s = compact(np.array([samples[i].at_s for i in kept]))
    return Figure(
        name=name,
        title=f"{worker}, {tier}",
        data=[_area(owner, at_s, values[kept] / scale, unit) for owner, values in series.items()],
        layout=layout(
            axis("seconds since the start", rangemode="tozero"),
            axis(unit, rangemode="tozero", nticks=6, tickformat=",~r"),
            hovermode="x unified",
        ),
        height_px=_HEIGHT_PX,
    )


def _series(rows: Sequence[Mapping[str, int]]) -> dict[str, Numbers]:
    """Bytes of each owner that ever had some, from the ground up: known ones as the theme lists them, then the others."""
    owners = {owner for row in rows for owner, n_bytes in row.items() if n_bytes}
    known = [owner for owner in MEMORY_OWNERS if owner in owners]
    ordered = [*known, *sorted(owners - set(known))]
    return {owner: np.array([row.get(owner, 0) for row in rows], dtype=np.float64) for owner in ordered}


def _look(owner: str) -> tuple[str, str]:
    """Colour and name for readers."""
    return MEMORY_OWNERS.get(owner) or (OTHER_OWNERS, owner.replace("_", " "))


def _area(owner: str, at_s: list[float | None], values: Numbers, unit: str) -> Json:
    color, name = _look(owner)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": plot_text(name),
        "legendgroup": name,
        "stackgroup": "memory",
        "x": at_s,
        "y": compact(values, 4),
        "line": {"color": color, "width": 0, "shape": "hv"},
        "fillcolor": color,
        "hovertemplate": f"%{{y:,.4~g}} {unit}",
    }


def _table(samples: Sequence[ServerSample]) -> Table:
    rows = [
        (use.tier, _look(use.owner)[1], format_bytes(round(use.mean_bytes)), format_bytes(use.peak_bytes))
        for use in memory_use(samples)
        if use.peak_bytes
    ]
    return Table(
        head=("Tier", "Of", "Mean", "Peak"), rows=tuple(rows), title="All together", text_columns=frozenset({0, 1})
    )
