"""How much load, and in which rhythm: settings, and the plan of conversations that follows from them. Pure."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from random import Random

from common.errors import ConfigError
from loadgen.schedule.arrivals import arrival_times_s
from loadgen.schedule.curves import RateCurve, Steady
from loadgen.schedule.pacing import cut, replayed, start_each, start_turns, untimed, within
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


def planned(workload: Workload, load: Load, seed: int) -> Iterable[Conversation]:
    """What is sent, in order; the turns of an open loop carry their times. Equal arguments give equal plans.

    Raises ConfigError if a replay has no times, or if nothing would be sent.
    """
    limit = load.n_requests
    if limit is None and load.duration_s is None and not load.replay:
        limit = DEFAULT_REQUESTS
    source = conversations(workload)
    if load.replay:
        try:
            plan: Iterable[Conversation] = list(cut(replayed(source), limit))
        except ValueError as error:
            raise ConfigError(f"--replay: {error}") from error
    elif load.curve is not None:
        plan = _arriving(map(untimed, source), load, load.curve, limit, seed)
    else:
        plan = cut(map(untimed, source), limit)
    first = next(iterator := iter(plan), None)
    if first is None:
        raise ConfigError("nothing would be sent: the workload is empty, or --duration ends before the first arrival")
    return chain([first], iterator)


def _arriving(
    source: Iterator[Conversation], load: Load, curve: RateCurve, limit: int | None, seed: int
) -> list[Conversation]:
    times_s = arrival_times_s(curve, load.arrival, load.burstiness, Random(f"{seed}/arrivals"))
    if load.duration_s is not None and load.rate_per_s == math.inf:
        raise ConfigError("--rate=inf with --duration never ends: everything is due at once; give --num-requests")
    if load.turns_by == "arrivals":
        return start_turns(source, within(times_s, limit, load.duration_s), load.live, Random(f"{seed}/live"))
    return list(cut(start_each(source, within(times_s, limit, load.duration_s)), limit))


def mean_gap_s(plan: Iterable[Conversation]) -> float | None:
    """Mean time between two arrivals of a plan; 0 where nothing has a time; None where all are due at once."""
    times_s = [turn.at_s for conversation in plan for turn in conversation.turns if turn.at_s is not None]
    if not times_s:
        return 0.0
    span_s = max(times_s) - min(times_s)
    return span_s / (len(times_s) - 1) if span_s > 0 else (0.0 if len(times_s) == 1 else None)


def shared_out(plan: Iterable[Conversation], part: int, of: int) -> Iterator[Conversation]:
    """One process's conversations of a plan that `of` processes share."""
    return (conversation for conversation in plan if conversation.index % of == part)


def share_of(total: int | None, part: int, of: int) -> int | None:
    """One process's share of a number, such as a concurrency; the first ones take what is left over."""
    return None if total is None else total // of + (part < total % of)
