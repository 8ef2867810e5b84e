"""What the server said of itself during a run. Data only."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSample:
    """One worker at one moment."""

    role: str
    waiting: int
    running: int
    kv_used: float
    """Share of its KV memory that running requests hold, 0 to 1."""
    kv_cached: float = 0.0
    """Share that is kept for reuse and can go at any time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSample:
    """The server at one moment."""

    at_s: float
    """Since the run's start, on the client's clock."""
    waiting: int
    """Requests that nobody computes yet."""
    running: int
    kv_used: float | None
    """Share of all KV memory that running requests hold; None: not told."""
    workers: Mapping[str, WorkerSample] = field(default_factory=dict)
    """By name; empty where a server does not tell them apart."""
    memory: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    """Bytes by process (KV stores too), tier and owner; empty where a server does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeakCheck:
    """What a server held after the run that it did not hold before; requests of its other clients are in it."""

    held: Mapping[str, tuple[float, float]]
    """What: (before, after). Empty: nothing leaked."""
    waited_s: float
    """How long it took until counts were back, or were given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerView:
    """All that the server told."""

    source: str
    """Where from: `/status`, `/metrics`, or why nothing is known."""
    samples: tuple[ServerSample, ...] = ()
    failed_polls: int = 0
    """Looks that gave no sample."""
    poll_failure: str = ""
    """Why the last of them did not."""
    before: Mapping[str, object] | None = None
    """Its `/status` before the run, and after; None: it has none."""
    after: Mapping[str, object] | None = None
    leak_check: LeakCheck | None = None
    """None: not made."""
    leak_check_failed: str = ""
    """Why it could not be made, though it was asked for and the server has a page for it."""
