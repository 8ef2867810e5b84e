"""Time to first token against the length of the prompt: means hide mixes of short and long prompts."""

from collections.abc import Sequence

import numpy as np

from loadgen.output.html.run_view import RunView
from loadgen.output.html.section import Figure, Section, Table
from loadgen.output.html.theme import CACHED_SCALE, Json, axis, layout, unit_for
from loadgen.output.html.thin import compact, thin
from loadgen.output.html.wording import latency, plural, quantity, share
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
    return Section(
        name=name, title=title, short="Lengths", figures=(_scatter(told, prefix),), columns=1, tables=(_buckets(told),)
    )


def _scatter(records: list[RequestRecord], prefix: str) -> Figure:
    records = sorted(records, key=lambda record: record.prompt_tokens)
    values_ms = np.array([(record.ttft_s or 0.0) * 1e3 for record in records])
    factor, unit = unit_for(values_ms.max())
    kept = thin(values_ms)
    shown = [records[i] for i in kept]
    cached = [_cached_share([record]) for record in shown]
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


def _buckets(records: Sequence[RequestRecord]) -> Table:
    """Powers of two: the lengths people speak of."""
    by_power: dict[int, list[RequestRecord]] = {}
    for record in records:
        by_power.setdefault(max(record.prompt_tokens - 1, 0).bit_length(), []).append(record)
    rows = []
    for power in sorted(by_power):
        chosen = by_power[power]
        ttft_s = np.array([record.ttft_s for record in chosen], dtype=np.float64)
        tpot_s = [record.tpot_s for record in chosen if record.tpot_s is not None]
        first, last = 2 ** (power - 1) + 1 if power else 0, 2**power
        rows.append(
            (
                f"{first:,} – {last:,}" if first < last else f"{last:,}",
                quantity(len(chosen)),
                latency(float(np.percentile(ttft_s, 50))),
                latency(float(np.percentile(ttft_s, 90))),
                latency(float(np.percentile(tpot_s, 50)) if tpot_s else None),
                share(_cached_share(chosen)),
            )
        )
    head = ("Prompt tokens", "Requests", "TTFT p50", "TTFT p90", "TPOT p50", "Cached")
    return Table(head=head, rows=tuple(rows))


def _cached_share(records: Sequence[RequestRecord]) -> float | None:
    told = [record for record in records if record.cached_tokens is not None and record.prompt_tokens]
    prompts = sum(record.prompt_tokens for record in told)
    return sum(record.cached_tokens or 0 for record in told) / prompts if prompts else None
