"""Requests that stand still while others go on: what a watch for a standstill of the whole worker cannot see. Pure."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from common.ids import RequestId
from services.worker.core.watchdog import Wait


@dataclass(slots=True)
class _Seen:
    """A request that nothing but its own next step, load or copy can move on."""

    progress: Hashable
    idle_ms: float = 0.0
    """While others went on."""
    told: bool = False


class Laggards:
    """Owns one record per request that could have moved, from one look to the next; it leaves with its request."""

    def __init__(self, bound_ms: float) -> None:
        """`bound_ms`: without progress while others go on."""
        self._bound_ms = bound_ms
        self._seen: dict[RequestId, _Seen] = {}

    def look(self, waits: Sequence[Wait], elapsed_ms: float, now_ms: float) -> tuple[Wait, float] | None:
        """Who has just become one, and for how long it stands still; each is told once.

        `elapsed_ms`: since the last look, as far as the worker went on in it. Who queues, has a deadline ahead, or waits
        for another process alone is none.
        """
        before, self._seen = self._seen, {}
        found: tuple[Wait, float] | None = None
        for one in waits:
            if one.queued or one.over or one.theirs or one.has_time(now_ms):
                continue
            seen = before.get(one.request)
            if seen is None or seen.progress != one.progress:
                seen = _Seen(one.progress)
            else:
                seen.idle_ms += elapsed_ms
            self._seen[one.request] = seen
            if found is None and not seen.told and seen.idle_ms >= self._bound_ms:
                seen.told, found = True, (one, seen.idle_ms)
        return found
