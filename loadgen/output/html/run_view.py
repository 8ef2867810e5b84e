"""A result as the sections look at it: its name and colour, and its latencies as arrays. Pure."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any  # Any: settings

import numpy as np

from loadgen.output.html.theme import CYCLE, DASHES, run_style
from loadgen.output.html.thin import Numbers
from loadgen.output.html.wording import per_second
from loadgen.results.metrics import Distribution, Slo, samples_needed
from loadgen.results.records import Outcome, RequestRecord
from loadgen.results.result import Result, RunFacts

NOT_A_KIND = frozenset({"rate", "concurrency", "num_requests", "duration", "seed", "warmup"})
"""Settings in which the runs of one sweep differ."""


_LONGEST_KIND = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """One run."""

    result: Result
    name: str
    """Unlike that of any other run on the page."""
    kind: str
    """What the runs of one curve have in common and those of another have not; empty: there is one curve."""
    color: str
    dash: str
    slo: Slo | None
    answered: tuple[RequestRecord, ...]
    """Measured and answered, by the time they were sent."""
    latencies_ms: Mapping[str, Numbers]
    """`ttft`, `tpot`, `itl`, `e2e`; sorted."""

    @property
    def attainment(self) -> float | None:
        """Share of the measured requests, those left on purpose aside, that met the targets; None without targets."""
        counted = [r for r in self.result.records if r.measured and r.outcome is not Outcome.CANCELLED]
        if self.slo is None or not counted:
            return None
        return sum(map(self.slo.met_by, counted)) / len(counted)

    @property
    def saturated(self) -> bool:
        """Work piled up."""
        return self.result.saturated

    @property
    def late(self) -> bool:
        """The load was not the one asked for."""
        return self.result.health.late

    def percentile_ms(self, latency: str, percent: float) -> float | None:
        """None below the samples that it needs."""
        found = self.latencies_ms[latency]
        return float(np.percentile(found, percent)) if found.size >= samples_needed(percent) else None


def views(results: Sequence[Result], names: Sequence[str] | None = None) -> list[RunView]:
    """Views of the results in their order; names default to the load, and to what sets runs apart."""
    kinds = _kinds(results)
    if names is None:
        names = _names(kinds, [load_text(result.facts) for result in results])
    rows = zip(results, _distinct(names), kinds, _styles(results, kinds), strict=True)
    return [_view(*row) for row in rows]


def _names(kinds: Sequence[str], loads: Sequence[str]) -> Sequence[str]:
    """What sets runs apart: their load, their kind, or both."""
    if len(set(kinds)) == 1:
        return loads
    return kinds if len(set(loads)) == 1 else [f"{kind}, {load}" for kind, load in zip(kinds, loads, strict=True)]


def trusted_s(shown: Distribution | None, percent: float) -> float | None:
    """A percentile; None without a sample or with fewer than it needs."""
    return None if shown is None else shown.trusted_s(percent)


def load_text(facts: RunFacts) -> str:
    """`8/s`, `all at once` or `16 at a time`."""
    if facts.request_rate is not None:
        return "all at once" if math.isinf(facts.request_rate) else per_second(facts.request_rate)
    return "closed loop" if facts.max_concurrency is None else f"{facts.max_concurrency} at a time"


def slo_of(facts: RunFacts) -> Slo | None:
    """The targets of the run, from its settings."""
    stated: object = facts.settings.get("goodput")
    if isinstance(stated, Slo):
        return stated
    if not isinstance(stated, Mapping):
        return None
    targets_s = {field.name: stated.get(field.name) for field in fields(Slo)}
    known = {name: float(value) for name, value in targets_s.items() if isinstance(value, int | float)}
    return Slo(**known) if known else None


def _view(result: Result, name: str, kind: str, style: tuple[str, str]) -> RunView:
    done = sorted((r for r in result.records if r.measured and r.outcome is Outcome.OK), key=lambda r: r.sent_s)
    return RunView(
        result=result,
        name=name,
        kind=kind,
        color=style[0],
        dash=style[1],
        slo=slo_of(result.facts),
        answered=tuple(done),
        latencies_ms={
            "ttft": _sorted_ms(record.ttft_s for record in done),
            "tpot": _sorted_ms(record.tpot_s for record in done),
            "itl": _sorted_ms(gap_s for record in done for gap_s in record.token_gaps_s()),
            "e2e": _sorted_ms(record.e2e_s for record in done),
        },
    )


def _sorted_ms(values_s: Iterable[float | None]) -> Numbers:
    return np.sort(np.fromiter((value for value in values_s if value is not None), dtype=np.float64)) * 1e3


def _kinds(results: Sequence[Result]) -> list[str]:
    stated = [_stated(result.facts) for result in results]
    names = dict.fromkeys(name for one in stated for name in one)
    differing = [name for name in names if len({repr(one.get(name)) for one in stated}) > 1]
    kinds = [", ".join(_setting_text(name, one.get(name)) for name in differing) for one in stated]
    labels = [_setting_text("label", one.get("label", {})) for one in stated]
    if all(labels) and len(set(labels)) == len(set(kinds)):  # they were put there to tell runs apart
        return labels
    return [kind if len(kind) <= _LONGEST_KIND else f"{kind[: _LONGEST_KIND - 1]}…" for kind in kinds]


def _styles(results: Sequence[Result], kinds: Sequence[str]) -> list[tuple[str, str]]:
    """Sweeps of several kinds share a colour per load and differ in their dashes; else every run has its own."""
    loads = [load_text(result.facts) for result in results]
    colors, dashes = list(dict.fromkeys(loads)), list(dict.fromkeys(kinds))
    pairs = set(zip(loads, kinds, strict=True))
    if not (len(pairs) == len(loads) and 1 < len(dashes) <= len(DASHES) and 1 < len(colors) <= len(CYCLE)):
        return [run_style(i) for i in range(len(results))]
    return [(CYCLE[colors.index(a)], DASHES[dashes.index(b)]) for a, b in zip(loads, kinds, strict=True)]


def _stated(facts: RunFacts) -> dict[str, Any]:
    settings = {name: value for name, value in facts.settings.items() if name not in NOT_A_KIND}
    where = {} if "cluster" in settings else {"url": facts.url}  # a cluster of our own has another port every time
    return settings | where | {"model": facts.model}


def _setting_text(name: str, value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(str(text) for text in value.values())
    return str(value) if isinstance(value, str) else f"{name.replace('_', '-')} {value}"


def _distinct(names: Sequence[str]) -> list[str]:
    times, seen, found = Counter(names), Counter[str](), []
    for name in names:
        seen[name] += 1
        found.append(f"{name} ({seen[name]})" if times[name] > 1 else name)
    return found
