"""A finished run: what was run, what came of it, and whether to believe it. Data only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any  # Any: JSON

from loadgen.results.health import GeneratorHealth
from loadgen.results.metrics import Summary
from loadgen.results.records import RequestRecord
from loadgen.results.timeline import ServerView
from loadgen.stats.resampling import Interval
from loadgen.stats.saturation import Saturation


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What was run, for the report."""

    date: str
    """UTC, ISO 8601."""
    command: tuple[str, ...]
    url: str
    endpoint: str
    model: str
    num_prompts: int
    request_rate: float | None
    """Per second; infinity: all at once; None: closed loop."""
    arrival: str | None
    burstiness: float | None
    max_concurrency: int | None
    seed: int
    settings: Mapping[str, Any]
    """Every setting of the run by the name of its flag; secrets are left out."""
    host: Mapping[str, Any]
    workload: str = ""
    """In one line."""
    workload_source: str = ""
    """Where its lengths come from; empty: from the flags."""
    interrupted: bool = False
    """Somebody ended it before its end; what was under way then is not in it."""
    notes: tuple[str, ...] = ()
    """What was not sent as planned, one sentence each."""


@dataclass(frozen=True, slots=True)
class Result:
    """One finished run."""

    facts: RunFacts
    summary: Summary
    health: GeneratorHealth
    records: Sequence[RequestRecord]
    server: ServerView
    saturation: Saturation | None
    """None: closed loop, where nothing can pile up, or too few requests to tell."""
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    """95 % intervals of numbers, by their keys in result.json."""

    @property
    def saturated(self) -> bool:
        """Work piled up: latencies measure the length of the run."""
        return self.saturation is not None and self.saturation.detected

    @property
    def leaked(self) -> bool:
        """The server held after the run what it did not hold before."""
        return self.server.leak_check is not None and bool(self.server.leak_check.held)
