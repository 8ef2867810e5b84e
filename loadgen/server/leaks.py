"""Did the run leave anything behind? What a server holds after it is compared with what it held before."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

from loadgen.results.timeline import LeakCheck
from loadgen.server.api import NoAnswer

SETTLED_S = 1.0
"""Workers report twice a second: a sooner look may show the time before the run's last request."""
DEADLINE_S = 10.0
_EVERY_S = 0.25

Held = Mapping[str, float]


def grown(before: Held, after: Held) -> dict[str, tuple[float, float]]:
    """What is more now than it was, with both numbers; what others held before the run is no leak of ours. Pure."""
    pairs = {name: (before.get(name, 0.0), value) for name, value in after.items()}
    return {name: (was, now) for name, (was, now) in pairs.items() if now > was}


async def check_leaks(
    before: Held,
    look: Callable[[], Awaitable[Held]],
    *,
    settled_s: float = SETTLED_S,
    deadline_s: float = DEADLINE_S,
    every_s: float = _EVERY_S,
) -> LeakCheck | None:
    """Look until everything is back, `settled_s` after the call at the soonest and `deadline_s` after it at the latest.

    `look` may raise NoAnswer or ValueError: it is asked again. None: it did not answer after `settled_s` (`deadline_s`, if
    that is sooner), and what it said before that proves nothing.
    """
    started_s = time.monotonic()
    held: dict[str, tuple[float, float]] | None = None
    proven = False
    while True:
        waited_s = time.monotonic() - started_s
        try:
            held = grown(before, await look())
        except (NoAnswer, ValueError):
            looked = False
        else:
            looked = True
            proven = proven or waited_s >= min(settled_s, deadline_s)
        if (looked and proven and not held) or waited_s >= deadline_s:
            return LeakCheck(held=held, waited_s=waited_s) if proven and held is not None else None
        await asyncio.sleep(every_s)
