"""Which workers take a request: a (prefill, decode) pair, or one mixed worker. Pure: no clock, no I/O, no randomness.

A prefill worker counts only together with a decode worker that runs the very same model, because KV flows between them.
A mixed worker is a choice of its own beside the prefill workers.
"""

import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from common.ids import RequestId, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """What a router may know about one worker."""

    id: WorkerId
    role: str
    """prefill, decode or mixed; others are never chosen."""
    model: Hashable
    """KV may flow between two workers whose `model` is equal; here the ModelIdentity."""
    accepting: bool
    """False while connecting, silent, draining, or serving another model than the caller's."""
    waiting_tokens: int = 0
    """Prompt tokens not computed yet: the larger of the worker's last report (stale by up to one Ping) and what the
    caller charged it with."""
    requests: int = 0
    """Requests that live there, found in the same way."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes. `decode` is None on a mixed worker, which answers alone."""

    entry: WorkerId
    decode: WorkerId | None

    @property
    def workers(self) -> tuple[WorkerId, ...]:
        """Everybody who will hold something of the request."""
        return (self.entry,) if self.decode is None else (self.entry, self.decode)


@dataclass(frozen=True, slots=True)
class NoRoute:
    """Nobody can take it; `reason` says what is missing, for people."""

    reason: str


class RoutingPolicy(Protocol):
    """The question that every routing rule answers."""

    def choose(self, request: RequestId, workers: Sequence[WorkerView], turn: int) -> Route | NoRoute:
        """`turn` counts the caller's requests; it is all the memory that a rule has."""
        ...


def reason_not_ready(workers: Sequence[WorkerView]) -> str | None:
    """Why `workers` can serve nobody now; None if they can."""
    return None if _entries(workers) else _missing(workers)


def _missing(workers: Sequence[WorkerView]) -> str:
    counts = {role: sum(w.role == role for w in workers) for role in ("prefill", "decode", "mixed")}
    ready = {role: sum(w.role == role and w.accepting for w in workers) for role in counts}
    text = ", ".join(f"{role}: {ready[role]} of {counts[role]} ready" for role in counts)
    if ready["prefill"] and ready["decode"]:
        return f"no ready prefill worker runs the same model as a ready decode worker ({text})"
    return f"a prefill and a decode worker, or a mixed worker, must be ready ({text})"


def _fitting(entry: WorkerView, workers: Sequence[WorkerView]) -> list[WorkerView]:
    return [w for w in workers if w.role == "decode" and w.accepting and w.model == entry.model]


def _entries(workers: Sequence[WorkerView]) -> list[WorkerView]:
    """Workers that a request may be sent to first, by id."""
    return sorted(
        (w for w in workers if w.accepting and (w.role == "mixed" or (w.role == "prefill" and _fitting(w, workers)))),
        key=lambda w: w.id,
    )


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """Everybody in turn, in the order of ids: the n-th request goes to the n-th entry and the n-th decode worker."""

    def choose(self, request: RequestId, workers: Sequence[WorkerView], turn: int) -> Route | NoRoute:
        """The next pair or mixed worker."""
        entries = _entries(workers)
        if not entries:
            return NoRoute(_missing(workers))
        entry = entries[turn % len(entries)]
        if entry.role == "mixed":
            return Route(entry.id, None)
        decodes = sorted(_fitting(entry, workers), key=lambda w: w.id)
        return Route(entry.id, decodes[turn % len(decodes)].id)


@dataclass(frozen=True, slots=True)
class LeastLoad:
    """The entry with the fewest prompt tokens to compute, and the decode worker with the fewest requests.

    An entry's equals are told apart by their requests. What is still equal is spread by a hash of (request, worker),
    so that the same inputs give the same answer in every process.
    """

    def choose(self, request: RequestId, workers: Sequence[WorkerView], turn: int) -> Route | NoRoute:
        """The least loaded pair or mixed worker; `turn` is not used."""
        entries = _entries(workers)
        if not entries:
            return NoRoute(_missing(workers))
        spread = _spread(request)
        entry = min(entries, key=lambda w: (w.waiting_tokens, w.requests, spread(w), w.id))
        if entry.role == "mixed":
            return Route(entry.id, None)
        decode = min(_fitting(entry, workers), key=lambda w: (w.requests, w.waiting_tokens, spread(w), w.id))
        return Route(entry.id, decode.id)


def _spread(request: RequestId) -> Callable[[WorkerView], int]:
    return lambda worker: zlib.crc32(f"{request}/{worker.id}".encode())


POLICIES: Mapping[str, RoutingPolicy] = {"round-robin": RoundRobin(), "least-load": LeastLoad()}
"""By the name a setting gives; the values are stateless."""
