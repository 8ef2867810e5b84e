"""The rules that pick one worker out of several, for prefill and for decode alike. Pure.

    round-robin      everybody in turn, in the order of ids
    least-load       whose queue is shortest, in predicted time
    session          the same worker for one session (rendezvous hashing), unless the gate is shut
    longest-prefix   who holds most of the prompt, each tier by its worth, unless the gate is shut
    predicted-time   who would be done first: queue plus own work (MemServe, eq. 1), and what that costs others
    worker=ID        this one: for experiments

What is still equal is spread by a hash of (request, worker), so that the same inputs give the same answer everywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from common.errors import InvalidRequest
from common.ids import RequestId
from common.policy.estimates import Estimate, Prompt

PIN = "worker="
_NEARLY = 0.05  # fitted numbers of equal workers differ by that much: no reason to prefer one of them for ever
_NEARLY_MS = 0.5


@dataclass(frozen=True, slots=True)
class Side:
    """What a rule knows besides the candidates."""

    prompt: Prompt
    gate: float
    turn: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Who was chosen by which rule, out of whom."""

    rule: str
    chosen: Estimate
    candidates: tuple[Estimate, ...]
    gated: int = 0
    """Candidates that the load gate kept out."""


class Rule(Protocol):
    """Picks one of the candidates; None if none of them is allowed."""

    @property
    def name(self) -> str:
        """As settings and headers write it."""
        ...

    def choose(self, side: Side, candidates: Sequence[Estimate]) -> Choice | None:
        """The best candidate; None without any."""
        ...


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """The n-th request goes to the n-th worker."""

    name: str = "round-robin"

    def choose(self, side: Side, candidates: Sequence[Estimate]) -> Choice | None:
        """The next in the order of ids."""
        if not candidates:
            return None
        ordered = sorted(candidates, key=lambda one: one.worker)
        return Choice(self.name, ordered[side.turn % len(ordered)], tuple(candidates))


@dataclass(frozen=True, slots=True)
class LeastLoad:
    """The shortest time before and for a prompt of which nothing is cached."""

    name: str = "least-load"

    def choose(self, side: Side, candidates: Sequence[Estimate]) -> Choice | None:
        """The least loaded; `Nearly` equal ones by their number of requests."""
        if not candidates:
            return None
        near = nearly_best(candidates, lambda one: one.load_ms)
        spread = spread_by(side.prompt.request)
        return Choice(self.name, min(near, key=lambda one: (one.requests, spread(one), one.worker)), tuple(candidates))


@dataclass(frozen=True, slots=True)
class Session:
    """One session, one worker, without a table: every gateway finds the same. Without a session: LeastLoad.

    Source: rendezvous hashing (Thaler and Ravishankar, 1998): a worker that comes or goes moves only its own sessions.
    """

    name: str = "session"

    def choose(self, side: Side, candidates: Sequence[Estimate]) -> Choice | None:
        """The session's worker among those that the gate lets through."""
        if side.prompt.session is None or not candidates:
            return LeastLoad().choose(side, candidates)
        open_ones = through_gate(candidates, side.gate)
        rank = spread_by(RequestId(f"session/{side.prompt.session}"))
        chosen = max(open_ones, key=lambda one: (rank(one), one.worker))
        return Choice(self.name, chosen, tuple(candidates), len(candidates) - len(open_ones))


@dataclass(frozen=True, slots=True)
class LongestPrefix:
    """Whoever holds most of the prompt, as long as it is not too busy; nobody holds anything: LeastLoad."""

    name: str = "longest-prefix"

    def choose(self, side: Side, candidates: Sequence[Estimate]) -> Choice | None:
        """The largest worth among those that the gate lets through; equals by load."""
        open_ones = through_gate(candidates, side.gate)
        if not open_ones:
            return None
        longest = max(one.worth_tokens for one in open_ones)
        best = [one for one in open_ones if one.worth_tokens >= longest * (1 - _NEARLY)]
        found = LeastLoad().choose(side, best)
        assert found is not None, "there is a longest one"
        return Choice(self.name, found.chosen, tuple(candidates), len(candidates) - len(open_ones))


@dataclass(frozen=True, slots=True)
class PredictedTime:
    """argmin over workers of queue + (1 + crowd) * (own work + work of computing again what it drives out of the cache).

    MemServe (arXiv 2406.17565), eq. 1, as long as somebody is idle and no cache is full: the time of this request only. The
    rest is what it takes from others. `crowd`: prompts that wait even on the least crowded worker; whoever adds work then,
    wherever, lets so many wait for it. Without that, copies of prefixes spread under load until caches hold little else
    (benchmarks/routing_policies). Among choices that are as good as equal, who holds more wins, then who has fewer requests.
    """

    name: str = "predicted-time"

    def choose(self, side: Side, candidates: Sequence[Estimate]) -> Choice | None:
        """Who would be done first, at what it costs the others."""
        if not candidates:
            return None
        each = 1.0 + min(one.waiting for one in candidates)
        near = nearly_best(candidates, lambda one: one.queued_ms + each * (one.own_ms + one.evict_ms))
        spread = spread_by(side.prompt.request)
        chosen = min(near, key=lambda one: (-one.hit_tokens, one.requests, spread(one), one.worker))
        return Choice(self.name, chosen, tuple(candidates))


@dataclass(frozen=True, slots=True)
class Pinned:
    """A worker by name, for experiments."""

    worker: str

    @property
    def name(self) -> str:
        """As a header writes it."""
        return f"{PIN}{self.worker}"

    def choose(self, side: Side, candidates: Sequence[Estimate]) -> Choice | None:
        """That worker, if it is a candidate."""
        for one in candidates:
            if one.worker == self.worker:
                return Choice(self.name, one, tuple(candidates))
        return None


def through_gate(candidates: Sequence[Estimate], gate: float) -> list[Estimate]:
    """Those at most (1 + gate) times as loaded as the least loaded, which always passes."""
    limit_ms = (1.0 + gate) * min((one.load_ms for one in candidates), default=0.0)
    return [one for one in candidates if one.load_ms <= limit_ms]


def nearly_best(candidates: Sequence[Estimate], time_ms: Callable[[Estimate], float]) -> list[Estimate]:
    """Those whose time is the best one or as good as it."""
    times_ms = [time_ms(one) for one in candidates]
    limit_ms = min(times_ms) * (1 + _NEARLY) + _NEARLY_MS
    return [one for one, ms in zip(candidates, times_ms, strict=True) if ms <= limit_ms]


def spread_by(request: RequestId) -> Callable[[Estimate], int]:
    """A hash that differs for every request and is the same in every process."""
    return lambda one: int.from_bytes(blake2b(f"{request}/{one.worker}".encode(), digest_size=8).digest())


RULES: Mapping[str, Rule] = {
    rule.name: rule for rule in (RoundRobin(), LeastLoad(), Session(), LongestPrefix(), PredictedTime())
}
"""By the name a setting gives; the values are stateless."""


def rule_named(name: str) -> Rule:
    """The rule of that name, or the one that names a worker. Raises InvalidRequest: names come from clients too."""
    if name.startswith(PIN):
        return Pinned(name.removeprefix(PIN))
    if name not in RULES:
        raise InvalidRequest(f"{name!r} is no routing rule; there are {', '.join(RULES)} and {PIN}ID")
    return RULES[name]
