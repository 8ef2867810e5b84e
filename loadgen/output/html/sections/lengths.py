"""Time to first token against the length of the prompt: means hide mixes of short and long prompts."""

import numpy as np

from loadgen.output.html.run_view import RunView, trusted_s
from loadgen.output.html.section import Figure, Section, Table
from loadgen.output.html.theme import CACHED_SCALE, Json, axis, layout, unit_for
from loadgen.output.html.thin import compact, thin
from loadgen.output.html.wording import UNKNOWN, latency, plural, quantity, share
from loadgen.results.buckets import by_input_length
from loadgen.results.metrics import cached_share, samples_needed
from loadgen.results.records import RequestRecord


def build(run: RunView, prefix: str = "") -> Section | None:
    """None without answers; where all prompts are equally long, only a note."""
    told = [record for record in run.answered if record.ttft_s is not None]
    lengths = {record.prompt_tokens for record in told}
    if not told:
        return None
    name, title = f"{prefix}lengths", "By prompt length"
    if len(lengths) == 1:
        text = f"every prompt has {plural(lengths.pop(), 'token')}" if lengths != {0} else "prompt lengths are unknown"
        return Section(name=name, title=title, short="Lengths", note=f"Not shown: {text}.")
    table = _buckets(run)
    few = any(UNKNOWN in row[3:5] for row in table.rows)
    note = f"A median is given from {samples_needed(50)} answers on, p90 from {samples_needed(90)}." if few else ""
    return Section(
        name=name,
        title=title,
        short="Lengths",
        note=note,
        figures=(_scatter(told, prefix),),
        columns=1,
        tables=(table,),
    )


def _scatter(records: list[RequestRecord], prefix: str) -> Figure:
    records = sorted(records, key=lambda record: record.prompt_tokens)
    values_ms = np.array([(record.ttft_s or 0.0) * 1e3 for record in records])
    factor, unit = unit_for(values_ms.max())
    kept = thin(values_ms)
    shown = [records[i] for i in kept]
    cached = [cached_share([record]) for record in shown]
    marker: Json = {"size": 6, "opacity": 0.8, "color": "$blue"}
    if any(part is not None for part in cached):
        bar = {"tickformat": ".0%", "thickness": 10, "outlinewidth": 0}
        colors = [part or 0.0 for part in cached]
        marker |= {"color": colors, "colorscale": CACHED_SCALE, "cmin": 0, "cmax": 1, "colorbar": bar}
    trace: Json = {
        "type": "scatter",
        "mode": "markers",
        "x": [record.prompt_tokens for record in shown],
        "y": compact(values_ms[kept] * factor),
        "text": [f"{share(part)} cached, request {r.index}" for part, r in zip(cached, shown, strict=True)],
        "marker": marker,
        "hovertemplate": f"%{{x:,}} tokens: %{{y:,.4~g}} {unit}<br>%{{text}}<extra></extra>",
    }
    plot = layout(axis("prompt tokens", rangemode="tozero"), axis(unit, rangemode="tozero"))
    title = "TTFT of each request" + ("; colour: share of its prompt found in cache" if "colorbar" in marker else "")
    return Figure(name=f"{prefix}length-ttft", title=title, data=[trace], layout=plot, height_px=320)


def _buckets(run: RunView) -> Table:
    """Powers of two: the lengths people speak of."""
    rows = []
    for part in by_input_length(run.result.records):
        if not part.answered:
            continue
        (first, last), mean_s = part.key, part.ttft.mean_s if part.ttft else None
        rows.append(
            (
                f"{first:,} – {last:,}" if first < last else f"{last:,}",
                quantity(part.answered),
                latency(mean_s),
                *(latency(trusted_s(part.ttft, percent)) for percent in (50, 90)),
                latency(trusted_s(part.tpot, 50)),
                share(part.cached_share),
            )
        )
    head = ("Prompt tokens", "Requests", "TTFT mean", "TTFT p50", "TTFT p90", "TPOT p50", "Cached")
    return Table(head=head, rows=tuple(rows))
