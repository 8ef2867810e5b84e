"""Kinds of requests, and the workers that served them, a row each."""

from dataclasses import replace

from loadgen.output.html.run_view import RunView, trusted_s
from loadgen.output.html.section import Section, Table
from loadgen.output.html.wording import latency, quantity, share
from loadgen.results.buckets import Bucket, by_group, by_worker, phases_served


def build(run: RunView, prefix: str = "") -> Section | None:
    """None where requests are of one kind and nobody tells who served them."""
    tables = [table for table in (_groups(run), _workers(run)) if table is not None]
    if not tables:
        return None
    title = "By group and by worker"
    if len(tables) == 1:
        title, tables = tables[0].title, [replace(tables[0], title="")]
    return Section(name=f"{prefix}groups", title=title, short="Groups", tables=tuple(tables))


def _groups(run: RunView) -> Table | None:
    parts = by_group(run.result.records)
    if len(parts) < 2:
        return None
    rows = []
    for part in parts:
        mean_prompt = part.mean_input_tokens
        counts = (quantity(part.answered), quantity(part.failed), quantity(mean_prompt and round(mean_prompt)))
        rows.append((part.key or "(none)", *counts, share(part.cached_share), *_latencies(part)))
    head = ("Group", "Answered", "Failed", "Mean prompt", "Cached", "TTFT p50", "TTFT p90", "TPOT p50", "TPOT p90")
    return Table(title="By group", head=head, rows=tuple(rows))


def _workers(run: RunView) -> Table | None:
    rows = []
    for phase in phases_served(run.answered):
        parts = by_worker(run.answered, phase)
        n_answered = sum(part.answered for part in parts)
        for part in parts:
            tokens = part.output_tokens if phase == "decode" else part.input_tokens
            counts = (quantity(part.answered), share(part.answered / n_answered), quantity(tokens))
            rows.append((part.key, phase, *counts, *_latencies(part)))
    if not rows:
        return None
    head = ("Worker", "Phase", "Requests", "Share", "Tokens", "TTFT p50", "TTFT p90", "TPOT p50", "TPOT p90")
    title = "By worker (tokens: of prompts for prefill, of answers for decode)"
    return Table(title=title, head=head, rows=tuple(rows), text_columns=frozenset({0, 1}))


def _latencies(part: Bucket[str]) -> list[str]:
    return [latency(trusted_s(shown, percent)) for shown in (part.ttft, part.tpot) for percent in (50, 90)]
