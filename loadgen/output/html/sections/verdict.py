"""The page in one paragraph, a row of figures, and what must be known before believing them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loadgen.output.html.run_view import RunView, load_text
from loadgen.output.html.sections.curves import load_axis
from loadgen.output.html.wording import UNKNOWN, latency, per_second, plural, quantity, seconds, share, target_text
from loadgen.output.warnings import warnings
from loadgen.results.metrics import Distribution, Slo

_ATTAINMENT_WANTED = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Head of the page."""

    text: str
    tiles: tuple[tuple[str, str, str], ...] = ()
    """Name, value, and what belongs to it."""
    warnings: tuple[str, ...] = ()


def build(runs: Sequence[RunView]) -> Verdict:
    """Of one run or of several."""
    if len(runs) == 1:
        return Verdict(text=_one(runs[0]), tiles=_tiles(runs[0]), warnings=tuple(warnings(runs[0].result)))
    return Verdict(text=_several(runs), warnings=tuple(_shared_warnings(runs)))


def _shared_warnings(runs: Sequence[RunView]) -> Iterator[str]:
    """Each text once, with the runs it is about."""
    told: dict[str, list[str]] = {}
    for run in runs:
        for text in warnings(run.result):
            told.setdefault(text, []).append(run.name)
    for text, names in told.items():
        about = "every run" if len(names) == len(runs) else "; ".join(names)
        yield f"{about}: {text}"


def _one(run: RunView) -> str:
    summary, facts = run.result.summary, run.result.facts
    total = summary.completed + summary.failed + summary.cancelled
    failed = f"{quantity(summary.failed)} failed" if summary.failed else "none failed"
    left = f", {quantity(summary.cancelled)} left on purpose" if summary.cancelled else ""
    if summary.measured == 0:
        return _nothing(run)
    parts = [
        f"{facts.model} at {load_text(facts)}: {quantity(summary.completed)} of {plural(total, 'request')} answered, {failed}{left}."
    ]
    if run.slo is not None and run.attainment is not None:
        parts.append(f"{share(run.attainment)} met {slo_text(run.slo)}, a goodput of {_goodput(run)}.")
    for name, shown in (("Time to first token", summary.ttft), ("Time per output token", summary.tpot)):
        if shown is not None:
            parts.append(f"{name}: {_middle(shown)}, {_tail(shown)}.")
    parts.append(
        f"The server gave {quantity(summary.output_tokens_per_s)} output tokens per second over {seconds(summary.duration_s)}."
    )
    return " ".join(parts)


def _nothing(run: RunView) -> str:
    summary, facts = run.result.summary, run.result.facts
    total = summary.completed + summary.failed + summary.cancelled
    why = "no request was sent"
    if total:
        why = f"{plural(total, 'request')} ended, and each was warm-up, cool-down or left on purpose"
    return f"Nothing was measured of {facts.model} at {load_text(facts)}: {why}. No number below counts; run longer."


def slo_text(slo: Slo) -> str:
    """`TTFT <= 500 ms and TPOT <= 50 ms`."""
    targets = (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s), ("E2E", slo.e2e_s))
    return " and ".join(f"{name} ≤ {target_text(target_s)}" for name, target_s in targets if target_s is not None)


def _goodput(run: RunView) -> str:
    goodput = run.result.summary.goodput_per_s
    return UNKNOWN if goodput is None else per_second(goodput)


def _middle(shown: Distribution) -> str:
    median_s = shown.trusted_s(50)
    return f"{latency(shown.mean_s)} in the mean" if median_s is None else f"{latency(median_s)} in the median"


def _tail(shown: Distribution) -> str:
    """The highest of p99, p90 and the maximum that the samples are enough for."""
    if (p99_s := shown.trusted_s(99)) is not None:
        return f"{latency(p99_s)} at p99"
    p90_s = shown.trusted_s(90)
    value = f"{latency(shown.max_s)} at most" if p90_s is None else f"{latency(p90_s)} at p90"
    return f"{value} (too few for {'p90' if p90_s is None else 'p99'}: {plural(shown.samples, 'sample')})"


def _tiles(run: RunView) -> tuple[tuple[str, str, str], ...]:
    summary = run.result.summary
    total = summary.completed + summary.failed + summary.cancelled
    tiles = [("Answered", f"{quantity(summary.completed)}", f"of {quantity(total)}, {quantity(summary.failed)} failed")]
    if run.slo is not None:
        tiles.append(("Goodput", _goodput(run), f"{share(run.attainment)} within targets"))
    else:
        tiles.append(("Throughput", per_second(summary.requests_per_s), "requests answered"))
    for name, shown in (("TTFT", summary.ttft), ("TPOT", summary.tpot), ("E2E", summary.e2e)):
        if shown is not None:
            tiles.append(_tile(name, shown))
    peak = f"peak {quantity(summary.peak_output_tokens_per_s)}"
    tiles.append(("Output tok/s", quantity(summary.output_tokens_per_s), peak))
    return tuple(tiles)


def _tile(name: str, shown: Distribution) -> tuple[str, str, str]:
    median_s = shown.trusted_s(50)
    column, value_s = ("mean", shown.mean_s) if median_s is None else ("p50", median_s)
    tails = ((f"p{percent}", shown.trusted_s(percent)) for percent in (99, 90))
    tail, tail_s = next(((text, found_s) for text, found_s in tails if found_s is not None), ("max", shown.max_s))
    return f"{name} {column}", latency(value_s), f"{tail} {latency(tail_s)}"


def _several(runs: Sequence[RunView]) -> str:
    load = load_axis(runs)
    lowest, highest = min(map(load.of, runs)), max(map(load.of, runs))
    span = f"at {quantity(lowest)}" if lowest == highest else f"from {quantity(lowest)} to {quantity(highest)}"
    models = ", ".join(dict.fromkeys(run.result.facts.model for run in runs))
    failed = sum(run.result.summary.failed for run in runs)
    failures = f"{plural(failed, 'request')} failed" if failed else "no request failed"
    parts = [f"{plural(len(runs), 'run')} of {models}, {span} {load.title}; {failures}."]
    empty = [run.name for run in runs if run.result.summary.measured == 0]
    if empty:
        parts.append(f"Nothing was measured in {', '.join(empty)}: no request counts.")
    for kind in dict.fromkeys(run.kind for run in runs):
        chosen = sorted((run for run in runs if run.kind == kind), key=load.of)
        name = f"{kind}: " if kind else ""
        sentences = [text for text in (_meets(chosen), _piles_up(chosen)) if text]
        if sentences:
            text = f"{name}{'; '.join(sentences)}."
            parts.append(text[0].upper() + text[1:])
    return " ".join(parts)


def _meets(runs: Sequence[RunView]) -> str:
    """What the highest load is that still meets the targets: the one before the first that does not."""
    judged = [run for run in runs if run.attainment is not None]
    if not judged:
        return ""
    good: RunView | None = None
    for run in judged:
        if (run.attainment or 0.0) < _ATTAINMENT_WANTED:
            break
        good = run
    targets = slo_text(judged[0].slo) if judged[0].slo is not None else "the targets"
    if len(judged) == 1:
        return f"{share(judged[0].attainment)} of the requests met {targets}"
    if good is None:
        return f"at no load 90 % of the requests met {targets}"
    return f"up to {load_text(good.result.facts)} at least 90 % of the requests met {targets}"


def _piles_up(runs: Sequence[RunView]) -> str:
    first = next((run for run in runs if run.saturated), None)
    return "" if first is None else f"from {load_text(first.result.facts)} on the server was saturated"
