"""How much load, and in which rhythm: settings, and the plan of conversations that follows from them. Pure."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from random import Random

from common.errors import ConfigError
from loadgen.schedule.arrivals import arrival_times_s
from loadgen.schedule.curves import RateCurve, Steady
from loadgen.schedule.pacing import cut, start_each, start_turns, untimed, within
from loadgen.workload.plan import Conversation, Workload, conversations

DEFAULT_REQUESTS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Settings of a run's rhythm. Exactly one of `curve`, `concurrency` and `replay` is set."""

    curve: RateCurve | None = None
    """Open loop: requests are sent whatever becomes of them."""
    concurrency: int | None = None
    """Closed loop: so many conversations at a time."""
    replay: bool = False
    """Open loop at the workload's own times."""
    arrival: str = "poisson"
    burstiness: float = 1.0
    turns_by: str = "answers"
    """`answers`: arrivals are conversations, their turns follow the answers. `arrivals`: every turn has its own arrival."""
    live: int = 1
    """Conversations that `turns_by=arrivals` draws from."""
    max_concurrency: int | None = None
    """A cap on requests in flight of an open loop: the semi-open loop."""
    n_requests: int | None = None
    duration_s: float | None = None

    def __post_init__(self) -> None:
        """Refuse what contradicts itself. Raises ConfigError."""
        if (self.curve is not None) + (self.concurrency is not None) + self.replay != 1:
            raise ConfigError(
                "give exactly one of --rate (or --ramp, or --rate-pattern: open loop), --concurrency (closed loop) "
                "and --replay (the times of a trace)"
            )
        if self.burstiness != 1.0 and self.arrival != "gamma":
            raise ConfigError(f"--burstiness={self.burstiness:g} needs --arrival gamma, not {self.arrival}")
        if self.curve is None and self.arrival != "poisson":
            raise ConfigError(f"--arrival={self.arrival} needs --rate, --ramp or --rate-pattern")
        if self.curve is None and self.turns_by != "answers":
            raise ConfigError("--turns-by=arrivals needs --rate, --ramp or --rate-pattern")
        if self.concurrency is not None and self.max_concurrency is not None:
            raise ConfigError("--max-concurrency caps an open loop; --concurrency is a closed one already")

    @property
    def rate_per_s(self) -> float | None:
        """The steady rate; None where there is none."""
        return self.curve.per_s if isinstance(self.curve, Steady) else None


@dataclass(frozen=True, slots=True)
class Plan:
    """What is sent, in order. Conversations are made when they are asked for: their contents may be larger than memory."""

    conversations: Iterator[Conversation]
    """At least one; the turns of an open loop carry their times."""
    gap_s: float | None
    """Mean time between two arrivals; 0 where nothing has a time, None where all are due at once."""


def planned(workload: Workload, load: Load, seed: int, starts_s: Sequence[float] | None = None) -> Plan:
    """The plan of a run; equal arguments give equal plans. `starts_s`: the conversations' own times, as of a trace.

    Raises ConfigError if a replay has no times, or if nothing would be sent.
    """
    limit = load.n_requests
    if limit is None and load.duration_s is None and not load.replay:
        limit = DEFAULT_REQUESTS
    gap_s: float | None = 0.0
    if load.replay:
        if starts_s is None:
            raise ConfigError("--replay needs a trace with times of its own; give --rate or --concurrency")
        order = sorted(range(len(starts_s)), key=starts_s.__getitem__)
        end_s = math.inf if load.duration_s is None else load.duration_s
        order = [index for index in order if starts_s[index] < end_s]
        gap_s = _mean_gap_s([starts_s[index] for index in order])
        plan = cut(map(workload.conversation, order), limit)
    elif load.curve is not None:
        times_s = list(within(_arrivals_s(load, load.curve, seed), limit, load.duration_s))
        gap_s = _mean_gap_s(times_s)
        plan = _arriving(workload, load, times_s, limit, seed)
    else:
        plan = cut(map(untimed, conversations(workload)), limit)
    first = next(plan, None)
    if first is None:
        raise ConfigError("nothing would be sent: the workload is empty, or --duration ends before the first arrival")
    return Plan(chain([first], plan), gap_s)


def _arrivals_s(load: Load, curve: RateCurve, seed: int) -> Iterator[float]:
    if load.duration_s is not None and load.n_requests is None and load.rate_per_s == math.inf:
        raise ConfigError("--rate=inf with --duration never ends: everything is due at once; give --num-requests")
    return arrival_times_s(curve, load.arrival, load.burstiness, Random(f"{seed}/arrivals"))


def _arriving(
    workload: Workload, load: Load, times_s: Sequence[float], limit: int | None, seed: int
) -> Iterator[Conversation]:
    if load.turns_by == "arrivals":
        return start_turns(workload, times_s, load.live, Random(f"{seed}/live"))
    return cut(start_each(map(untimed, conversations(workload)), times_s), limit)


def _mean_gap_s(times_s: Sequence[float]) -> float | None:
    if len(times_s) < 2:
        return 0.0
    span_s = max(times_s) - min(times_s)
    return span_s / (len(times_s) - 1) if span_s > 0 else None


def shared_out(plan: Iterable[Conversation], part: int, of: int, places: int | None) -> Iterator[Conversation]:
    """One process's conversations of a plan that `of` processes share: so many as it has of the `places`, if those count."""
    for conversation in plan:
        dealt_to = conversation.index if places is None else conversation.index % places
        if dealt_to % of == part:
            yield conversation


def share_of(total: int | None, part: int, of: int) -> int | None:
    """One process's share of a number of places; the first ones take what is left over."""
    return None if total is None else total // of + (part < total % of)
