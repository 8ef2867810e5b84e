"""What a worker's watchdog sees of it, what it does, and the state that it writes down. Pure.

Owns the Watchdog. What is particular to a role it is told once, by `attend`.
"""

from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass

import msgspec

from common.ids import RequestId
from kvstore.index.ledger import PageState
from services.worker.core.actions import Action
from services.worker.core.laggards import Laggards
from services.worker.core.parts import Parts
from services.worker.core.watchdog import Fired, Wait, Watchdog

_MOST_REQUESTS, _MOST_OWNERS = 64, 64  # of one dump; the log line must stay readable, and the loop goes on soon
_LAG_LOOK_MS = 1_000.0
_LISTED = (PageState.RESERVED, PageState.GRANTED, PageState.ACTIVE, PageState.QUARANTINED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What the watchdog asks a role's core, and may ask of it."""

    idle: Callable[[], bool]
    waits: Callable[[float], list[Wait]]
    """Every request that is here, at a time."""
    end: Callable[[RequestId, str, float], list[Action]]
    """Give a request up; its gateway may try it elsewhere. One that is not here changes nothing."""
    mark: Callable[[], Hashable] = lambda: None
    """Changes with progress that neither pages nor steps show."""
    oldest_held_ms: Callable[[float], float] = lambda _: 0.0
    """Age of the KV that is held longest for another worker."""


class Overseer:
    """Watches one worker."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._watchdog = Watchdog(parts.watch)
        self._laggards, self._looked_ms = Laggards(parts.watch.lag_ms), 0.0
        self._subject: Subject | None = None

    def attend(self, subject: Subject) -> None:
        """Watch it from now on."""
        self._subject = subject

    def on_tick(self, now_ms: float) -> Fired | None:
        """Time passed. If it fires, `state` is to be written down, and then comes `carry_out`."""
        subject = self._known
        if not self._watchdog.on_tick(self._mark(), now_ms, works=not subject.idle()):
            return self._look_for_laggards(now_ms)
        computing, lent_until_ms = len(self._parts.scheduler.flight) > 0, self._parts.cache.lent_until_ms
        return self._watchdog.look(subject.waits(now_ms), now_ms, computing=computing, lent_until_ms=lent_until_ms)

    def _look_for_laggards(self, now_ms: float) -> Fired | None:
        """Only while the worker as a whole goes on."""
        elapsed_ms = now_ms - self._looked_ms
        if elapsed_ms < _LAG_LOOK_MS or not self._parts.watch.stall_ms:
            return None
        self._looked_ms = now_ms
        if self._watchdog.stalled_ms >= _LAG_LOOK_MS:
            return None
        found = self._laggards.look(self._known.waits(now_ms), min(elapsed_ms, 2 * _LAG_LOOK_MS), now_ms)
        return None if found is None else self._watchdog.tell_alone(*found, now_ms)

    def carry_out(self, fired: Fired, now_ms: float) -> list[Action]:
        """End whom the watchdog chose."""
        if fired.end is None:
            return []
        why = "it did not move and others did" if fired.alone else "it was the youngest that could give way"
        text = f"nothing moved for {fired.stalled_ms / 1000:.1f} s and {why}"
        return self._known.end(fired.end, text, now_ms)

    def _mark(self) -> Hashable:
        parts, scheduler = self._parts, self._parts.scheduler
        flight, ledger = scheduler.flight, parts.pool.ledger
        moved = tuple(parts.cache.counters(parts.reuse.totals).values())
        steps = (flight.begun_total, len(flight), scheduler.computed_tokens_total)
        counts = msgspec.structs.astuple(ledger.counts())
        return steps, counts, ledger.freed_pages_total, moved, self._known.mark()

    @property
    def _known(self) -> Subject:
        assert self._subject is not None, "nobody to watch"
        return self._subject

    # -- state for others

    def degraded(self, now_ms: float) -> str:
        """Why others should be preferred for a while; empty if they need not."""
        held_ms, limit_ms = self.oldest_held_ms(now_ms), self._parts.watch.held_ms
        if held_ms > limit_ms:
            return f"KV is held for another process for {held_ms / 1000:.0f} s, longer than its lease and grace"
        if self._watchdog.fired_lately(now_ms):
            return f"it stood still with work to do, {self._watchdog.fired_total} times so far; see its log for `stuck`"
        return ""

    def oldest_held_ms(self, now_ms: float) -> float:
        """Age of what is quarantined or lent for longest; what is granted ends by its own lease."""
        lent_ms = self._parts.cache.gauges(now_ms)["oldest_pin_ms"]
        return max(lent_ms, self._known.oldest_held_ms(now_ms))

    def gauges(self, now_ms: float) -> dict[str, float]:
        """As in reports."""
        return {
            "stalled_ms": self._watchdog.stalled_ms,
            "oldest_held_ms": self.oldest_held_ms(now_ms),
            "degraded": float(bool(self.degraded(now_ms))),
        }

    def counters(self) -> dict[str, float]:
        """As in reports."""
        return {"watchdog_fired_total": float(self._watchdog.fired_total)}

    def state(self, now_ms: float) -> dict[str, object]:
        """All that somebody needs who wants to know why nothing moves; JSON."""
        parts, waits = self._parts, sorted(self._known.waits(now_ms), key=lambda one: -one.age_ms)
        ledger, step = parts.pool.ledger, parts.scheduler.step
        owners = {
            state.value: {o: int(ledger.page_ids(o).size) for o in list(ledger.owners(state))[:_MOST_OWNERS]}
            for state in _LISTED
        }
        return {
            "stalled_ms": round(self._watchdog.stalled_ms),
            "degraded": self.degraded(now_ms),
            "n_requests": len(waits),
            "requests": [_fields(one, now_ms) for one in waits[:_MOST_REQUESTS]],
            "pages": msgspec.to_builtins(ledger.counts()),
            "owners": owners,
            "step": None if step is None else {"number": step.number, "tokens": step.n_tokens, "loads": step.loads},
            "cache": parts.cache.gauges(now_ms),
            "exchanges": parts.cache.open_exchanges(now_ms),
            "callers": parts.callers.n_callers,
            "transports": msgspec.to_builtins(parts.neighbours.transports),
        }


def _fields(wait: Wait, now_ms: float) -> dict[str, object]:
    fields = {name: value for name, value in asdict(wait).items() if value not in ("", None, False)}
    fields.pop("progress", None)
    fields["age_ms"] = round(wait.age_ms)
    if wait.until_ms is not None:
        fields["until_ms"] = round(wait.until_ms - now_ms)
    return fields
