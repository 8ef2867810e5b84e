"""When a worker stands still although it has work, and who must end so that the others can go on. Pure.

Standing still is known by its mark: a value that changes with every step, page state, load, copy or token. What is only
slow is no standstill: a step in flight has `step_ms`, and a wait with a deadline of its own has that, if it is ahead.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from common.ids import RequestId
from common.leases import HELD_GRACE_MS, LEASE_MS

_MOST_TURN_MS = 1_000.0
"""A turn of the loop that took longer (the process was stopped, or the machine was) counts for no more than that."""
_LEAST_TURNS = 10
_MOST_BACKOFF = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchTerms:
    """How long is too long."""

    stall_ms: float = 15_000.0
    """Without progress. Longer than what is asked of others may take: lookups, loads by message, spills, commits. 0: no watch."""
    step_ms: float = 120_000.0
    """For one step of the engine."""
    held_ms: float = LEASE_MS + HELD_GRACE_MS
    """For KV that waits for somebody else: the longest lease and some grace."""
    lag_ms: float = 120_000.0
    """For one request that does not move while others do."""
    recent_ms: float = 60_000.0
    """How long after it fired a worker counts as degraded."""


USUAL_WATCH = WatchTerms()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """One request that is here, and what has to happen before it moves on."""

    request: RequestId
    phase: str
    age_ms: float
    """In this phase, or as long as it is here where that is not known."""
    pages: int = 0
    """That it holds."""
    waits_for: str = ""
    """And for whom; empty: for its next step alone."""
    until_ms: float | None = None
    """When that is given up at the latest, by its own rule; None: never, but for the request's deadline."""
    queued: bool = False
    """It stands behind others, and has its turn when they move."""
    loads: bool = False
    """KV is being fetched into its pages."""
    over: bool = False
    """It has ended already; its pages stay until nobody uses them."""
    theirs: bool = False
    """Another process alone can end this wait; the age of what is held tells when that takes too long."""
    in_step: bool = False
    """A step in flight computes it."""
    progress: Hashable = None
    """Changes whenever this request moves on."""

    def has_time(self, now_ms: float) -> bool:
        """Whether its deadline is ahead."""
        return self.until_ms is not None and self.until_ms > now_ms


@dataclass(frozen=True, slots=True)
class Fired:
    """The worker stands still. `end`: the request to give up; None: nobody's end would help, or it may not be."""

    text: str
    stalled_ms: float
    end: RequestId | None
    alone: bool = False
    """One request does, and others go on."""


class Watchdog:
    """Owns how long there was no progress, and whom it has ended since."""

    def __init__(self, terms: WatchTerms) -> None:
        self._terms = terms
        self._mark: Hashable = None
        self._ticked_ms: float | None = None
        self._turns, self._backoff, self._due_ms = 0, 1, terms.stall_ms
        self._ended: set[RequestId] = set()
        self._fired_ms: float | None = None
        self.stalled_ms = 0.0
        """Since the last sign of progress, while there is work; turns that took long count in part."""
        self.fired_total = 0

    def on_tick(self, mark: Hashable, now_ms: float, *, works: bool) -> bool:
        """Whether it is time for `look`."""
        before_ms, self._ticked_ms = self._ticked_ms, now_ms
        if not works or mark != self._mark or before_ms is None:
            self._mark, self._turns, self.stalled_ms = mark, 0, 0.0
            self._backoff, self._due_ms = 1, self._terms.stall_ms
            self._ended.clear()
            return False
        self.stalled_ms += min(max(0.0, now_ms - before_ms), _MOST_TURN_MS)
        self._turns += 1
        return bool(self._terms.stall_ms) and self._turns >= _LEAST_TURNS and self.stalled_ms >= self._due_ms

    def look(
        self, waits: Sequence[Wait], now_ms: float, *, computing: bool, lent_until_ms: float | None = None
    ) -> Fired | None:
        """What to do about it; None: it is right to wait.

        `computing`: a step is in flight. `lent_until_ms`: when the last lease of what is lent ends; None: nothing is.
        """
        if computing:
            if self.stalled_ms < self._terms.step_ms:
                return None
            return self._fire("a step does not end, and the engine cannot be interrupted", None, now_ms)
        patient = [one for one in waits if one.has_time(now_ms)]
        blocked = [one for one in waits if not one.queued and not one.over and one not in patient]
        lends = lent_until_ms is not None and lent_until_ms > now_ms
        others = bool(waits) and all(one.theirs for one in waits)
        if not blocked and (patient or lends or others):
            return None
        victim = self._youngest(one for one in blocked if one.loads) or self._youngest(o for o in blocked if o.pages)
        return self._fire(_text(blocked, waits), None if victim is None else victim.request, now_ms)

    def _youngest(self, waits: Iterable[Wait]) -> Wait | None:
        return min((one for one in waits if one.request not in self._ended), key=lambda one: one.age_ms, default=None)

    def tell_alone(self, one: Wait, idle_ms: float, now_ms: float) -> Fired:
        """One stands still beside others. It is ended if something holds it; a step, or its turn, still comes."""
        self.fired_total += 1
        self._fired_ms = now_ms
        what = one.waits_for or "its turn in a step"
        text = f"{one.request} in phase {one.phase} stands still while others go on; it waits for {what}"
        return Fired(text, idle_ms, one.request if one.waits_for and not one.in_step else None, alone=True)

    def _fire(self, text: str, end: RequestId | None, now_ms: float) -> Fired:
        self.fired_total += 1
        self._fired_ms = now_ms
        self._due_ms = self.stalled_ms + self._terms.stall_ms * self._backoff
        self._backoff = min(2 * self._backoff, _MOST_BACKOFF)
        if end is not None:
            self._ended.add(end)
        return Fired(text, self.stalled_ms, end)

    def fired_lately(self, now_ms: float) -> bool:
        """Whether it fired so short a time ago that the worker is not to be trusted yet."""
        return self._fired_ms is not None and now_ms - self._fired_ms < self._terms.recent_ms


def _text(blocked: Sequence[Wait], waits: Sequence[Wait]) -> str:
    if not waits:
        return "no request is here, and yet it is not idle"
    oldest = max(blocked or waits, key=lambda one: one.age_ms)
    what = oldest.waits_for or "its next step, and none begins"
    return f"{len(waits)} requests stand still; {oldest.request} in phase {oldest.phase} waits for {what}"
