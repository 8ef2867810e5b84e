"""The run over time: what the server held, when tokens came, and what each request saw."""

from collections.abc import Callable

import numpy as np

from loadgen.output.html.run_view import RunView
from loadgen.output.html.section import Figure, Key, Section
from loadgen.output.html.theme import Json, axis, frame, role_color, unit_for
from loadgen.output.html.thin import Numbers, compact, thin
from loadgen.output.html.wording import plot_text
from loadgen.results.records import Outcome, RequestRecord
from loadgen.results.throughput import tokens_of_chunks
from loadgen.results.timeline import WorkerSample

_ROW_PX, _GAP_PX, _EDGE_PX = 118, 44, 48
_MOST_WORKERS = 8  # with a key of their own; of more, a role has one
_IN_FLIGHT = "in flight at the client"
_Row = tuple[str, list[Json]]


def build(run: RunView, prefix: str = "") -> Section | None:
    """Of one run; None without requests. `prefix` keeps names on the page apart."""
    if not run.result.records:
        return None
    rows = [
        row
        for row in (_requests(run), _by_worker(run), _kv(run), _first_tokens(run), _tokens(run), _arrivals(run))
        if row[1]
    ]
    silent = "" if run.result.server.samples else f"The server told nothing of itself ({run.result.server.source})."
    data = [trace | {"xaxis": "x", "yaxis": _axis(i)} for i, (_, traces) in enumerate(rows) for trace in traces]
    height_px = _EDGE_PX + len(rows) * (_ROW_PX + _GAP_PX)
    figure = Figure(
        name=f"{prefix}timeline", title="", data=data, layout=_stacked(rows, height_px), height_px=height_px
    )
    return Section(
        name=f"{prefix}timeline",
        title="Timeline",
        short="Timeline",
        note=silent,
        keys=_keys(data),
        figures=(figure,),
        columns=1,
    )


def _axis(row: int) -> str:
    return "y" if row == 0 else f"y{row + 1}"


def _stacked(rows: list[_Row], height_px: int) -> Json:
    """Rows under each other over one time axis; each row's title stands above it."""
    found = frame(_EDGE_PX - 4)
    inner_px = height_px - _EDGE_PX
    found["margin"] = {"l": 64, "r": 16, "t": 4, "b": _EDGE_PX - 4}
    found["xaxis"] = axis("seconds since the start", anchor=_axis(len(rows) - 1), rangemode="tozero")
    found["annotations"] = []
    for i, (title, _) in enumerate(rows):
        top = 1 - (i * (_ROW_PX + _GAP_PX) + _GAP_PX - 14) / inner_px
        bottom = max(0.0, top - _ROW_PX / inner_px)
        name = "yaxis" if i == 0 else f"yaxis{i + 1}"
        percent = {"tickformat": ".2~%"} if "KV" in title else {}
        found[name] = axis("", domain=[bottom, top], rangemode="tozero", nticks=5, **percent)
        found["annotations"].append(
            {
                "text": f"<b>{title}</b>",
                "showarrow": False,
                "xref": "paper",
                "yref": "paper",
                "x": 0,
                "y": top,
                "xanchor": "left",
                "yanchor": "bottom",
                "yshift": 4,
                "font": {"color": "$ink", "size": 12},
            }
        )
    return found


def _keys(data: list[Json]) -> tuple[Key, ...]:
    found: dict[str, Key] = {}
    for trace in data:
        name = trace["legendgroup"]
        points = trace.get("mode") == "markers"
        if trace["type"] == "scatter" and name and name not in found:
            color = trace["marker"]["color"] if points else trace["line"]["color"]
            found[name] = Key(name=name, color=color, mark="points" if points else trace["line"].get("dash", "solid"))
    return tuple(found.values())


def _line(x: Numbers, y: Numbers, color: str, name: str, unit: str) -> Json:
    kept = thin(y)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": plot_text(name),
        "legendgroup": name,
        "x": compact(x[kept], 3),
        "y": compact(y[kept], 4),
        "line": {"color": color, "width": 1.5, "shape": "hv"},
        "hovertemplate": f"%{{y{unit}}} at %{{x:,.1f}} s<extra>%{{fullData.name}}</extra>",
    }


def _requests(run: RunView) -> _Row:
    records = run.result.records
    changes = sorted([(record.sent_s, 1) for record in records] + [(record.end_s, -1) for record in records])
    at_s = np.array([at for at, _ in changes])
    in_flight = np.cumsum([change for _, change in changes]).astype(np.float64)
    traces = [_line(at_s, in_flight, "$grey", _IN_FLIGHT, ":,")]
    samples = run.result.server.samples
    if samples:
        times_s = np.array([sample.at_s for sample in samples])
        running = np.array([float(sample.running) for sample in samples])
        waiting = np.array([float(sample.waiting) for sample in samples])
        traces.append(_line(times_s, running, "$green", "running in the server", ":,"))
        traces.append(_line(times_s, waiting, "$red", "waiting in the server", ":,"))
    return "Requests", traces


def _by_worker(run: RunView) -> _Row:
    return "Requests running and waiting, by worker", _worker_lines(
        run, lambda worker: float(worker.running + worker.waiting), ":,"
    )


def _kv(run: RunView) -> _Row:
    traces = _worker_lines(run, lambda worker: worker.kv_used, ":.1%")
    known = [sample for sample in run.result.server.samples if sample.kv_used is not None]
    if known:
        at_s = np.array([sample.at_s for sample in known])
        used = np.array([sample.kv_used for sample in known], dtype=np.float64)
        traces.insert(0, _line(at_s, used, "$ink", "all workers", ":.1%"))
    return "KV memory held by running requests" + (", by worker" if len(traces) > 1 else ""), traces


def _worker_lines(run: RunView, value: Callable[[WorkerSample], float], unit: str) -> list[Json]:
    samples = run.result.server.samples
    roles = {name: worker.role for sample in samples for name, worker in sample.workers.items()}
    traces = []
    seen: dict[str, int] = {}
    for name, role in sorted(roles.items()):
        known = [(sample.at_s, value(sample.workers[name])) for sample in samples if name in sample.workers]
        trace = _line(
            np.array([at_s for at_s, _ in known]), np.array([y for _, y in known]), role_color(role), name, unit
        )
        nth = seen[role] = seen.get(role, -1) + 1
        trace["line"]["dash"] = ("solid", "dot", "dash", "dashdot")[nth % 4]
        trace["legendgroup"] = name if len(roles) <= _MOST_WORKERS else f"{role} workers"
        traces.append(trace)
    return traces


def _first_tokens(run: RunView) -> _Row:
    ordered = sorted(run.result.records, key=lambda record: record.sent_s)
    groups: tuple[tuple[str, str, str, list[RequestRecord]], ...] = (
        ("answered", "$blue", "circle", [r for r in ordered if r.outcome is Outcome.OK]),
        ("left on purpose", "$grey", "circle-open", [r for r in ordered if r.outcome is Outcome.CANCELLED]),
        ("failed", "$red", "x", [r for r in ordered if r.outcome.failed]),
    )
    known_ms = [(record.ttft_s or 0.0) * 1e3 for record in ordered]
    factor, unit = unit_for(max(known_ms))
    traces = []
    for name, color, symbol, records in groups:
        if not records:
            continue
        values = np.array([(record.ttft_s or 0.0) * 1e3 * factor for record in records])
        kept = thin(values)
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "legendgroup": name,
                "x": compact(np.array([records[i].sent_s for i in kept])),
                "y": compact(values[kept]),
                "text": [_told(records[i]) for i in kept],
                "marker": {"color": color, "size": 7 if symbol == "x" else 5, "symbol": symbol, "opacity": 0.75},
                "cliponaxis": False,
                "hovertemplate": f"%{{y:,.4~g}} {unit}, sent at %{{x:,.1f}} s<br>%{{text}}<extra>%{{fullData.name}}</extra>",
            }
        )
    failed = " (0: none came)" if any(record.ttft_s is None for record in ordered) else ""
    return f"Time to first token of each request, {unit}{failed}", traces


def _told(record: RequestRecord) -> str:
    return f"request {record.index}" + (f": {record.outcome}" if record.outcome.failed else "")


def _tokens(run: RunView) -> _Row:
    at_s = [np.asarray(record.chunk_s, dtype=np.float64) for record in run.result.records]
    weights = [np.asarray(tokens_of_chunks(record), dtype=np.float64) for record in run.result.records]
    return "Output tokens per second", _bins(np.concatenate(at_s), np.concatenate(weights), "$green", "tokens")


def _arrivals(run: RunView) -> _Row:
    sent_s = np.array([record.sent_s for record in run.result.records])
    return "Requests sent per second", _bins(sent_s, np.ones(sent_s.size), "$sky", "requests")


def _bins(at_s: Numbers, weights: Numbers, color: str, noun: str) -> list[Json]:
    if not at_s.size:
        return []
    at_s = np.maximum(at_s, 0.0)  # the first send may be a hair before the run's start
    totals = np.append(np.bincount(at_s.astype(np.intp), weights=weights), 0.0)  # a step needs its end
    kept = thin(totals)
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": noun,
            "legendgroup": "",
            "x": kept.tolist(),
            "y": compact(totals[kept]),
            "line": {"color": color, "width": 1, "shape": "hv"},
            "fill": "tozeroy",
            "hovertemplate": f"%{{y:,}} {noun} in second %{{x:,}}<extra></extra>",
        }
    ]
