"""Kinds of requests, and the workers that served them, a row each."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from loadgen.output.html.run_view import RunView
from loadgen.output.html.section import Section, Table
from loadgen.output.html.wording import latency, quantity, share
from loadgen.results.records import Outcome, RequestRecord


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
    measured = [record for record in run.result.records if record.measured]
    names = sorted({record.group for record in measured})
    if len(names) < 2:
        return None
    rows = []
    for name in names:
        members = [record for record in measured if record.group == name]
        done = [record for record in members if record.outcome is Outcome.OK]
        failed = sum(record.outcome.failed for record in members)
        prompts = sum(record.prompt_tokens for record in done)
        told = any(record.cached_tokens is not None for record in done)
        cached = sum(record.cached_tokens or 0 for record in done) / prompts if told and prompts else None
        mean_prompt = prompts / len(done) if done else None
        counts = (quantity(len(done)), quantity(failed), quantity(mean_prompt and round(mean_prompt)), share(cached))
        rows.append((name or "(none)", *counts, *_latencies(done)))
    head = ("Group", "Answered", "Failed", "Mean prompt", "Cached", "TTFT p50", "TTFT p90", "TPOT p50", "TPOT p90")
    return Table(title="By group", head=head, rows=tuple(rows))


def _workers(run: RunView) -> Table | None:
    served = sorted({(phase, name) for record in run.answered for phase, name in record.workers.items()})
    if not served:
        return None
    served.sort(key=lambda pair: (pair[0] != "prefill", pair))
    rows = []
    for phase, name in served:
        done = [record for record in run.answered if record.workers.get(phase) == name]
        tokens = sum(r.output_tokens if phase == "decode" else r.prompt_tokens for r in done)
        part = len(done) / sum(phase in record.workers for record in run.answered)
        rows.append((name, phase, quantity(len(done)), share(part), quantity(tokens), *_latencies(done)))
    head = ("Worker", "Phase", "Requests", "Share", "Tokens", "TTFT p50", "TTFT p90", "TPOT p50", "TPOT p90")
    title = "By worker (tokens: of prompts for prefill, of answers for decode)"
    return Table(title=title, head=head, rows=tuple(rows), text_columns=frozenset({0, 1}))


def _latencies(records: Sequence[RequestRecord]) -> list[str]:
    found = []
    for samples in ([record.ttft_s for record in records], [record.tpot_s for record in records]):
        known = [sample for sample in samples if sample is not None]
        found += [latency(float(np.percentile(known, percent)) if known else None) for percent in (50, 90)]
    return found
