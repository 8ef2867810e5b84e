"""Who had which memory over the last minutes, as the workers reported it: the page `/status/memory`."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any  # Any: JSON

import msgspec

from common.messages.liveness import Report
from gateway.core.roster import WorkerState

EVERY_S = 1.0
"""Workers report twice a second."""
KEPT_SAMPLES = 600


def memory_fields(report: Report | None) -> list[dict[str, Any]]:
    """The parts of a worker's memory, for /status; empty before its first report."""
    parts = () if report is None else report.memory
    return [{"owner": part.owner, "tier": part.tier, "bytes": part.n_bytes} for part in parts]


class MemoryHistory:
    """Owns a ring of samples. Started and stopped on the event loop.

    A sample is kept as the JSON that it will be sent as: what a page of 10 minutes costs the event loop is one join, and
    what the ring costs is about 25 bytes for a part.
    """

    def __init__(self, workers: Callable[[], Sequence[WorkerState]], unix_ms: Callable[[], int]) -> None:
        """`workers`: everybody, with the last reports. `unix_ms`: the time of day."""
        self._workers, self._unix_ms = workers, unix_ms
        self._samples: deque[bytes] = deque(maxlen=KEPT_SAMPLES)
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Take a sample now, and one every second. Call on the running event loop."""
        self._timer = asyncio.get_running_loop().call_later(EVERY_S, self.start)
        self.take()

    def stop(self) -> None:
        """Take no more."""
        if self._timer is not None:
            self._timer.cancel()

    def take(self) -> None:
        """One sample, of every worker that has told of its memory."""
        told = {state.member.id: _by_tier(state.report) for state in self._workers() if state.report is not None}
        known = {name: tiers for name, tiers in told.items() if tiers}
        self._samples.append(msgspec.json.encode({"unix_ms": self._unix_ms(), "workers": known}))

    def page(self) -> bytes:
        """JSON: `every_s`, and `samples`, oldest first, each `{unix_ms, workers: {id: {tier: {owner: bytes}}}}`."""
        return b'{"every_s":%g,"samples":[%b]}' % (EVERY_S, b",".join(self._samples))


def _by_tier(report: Report) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for part in report.memory:
        found.setdefault(part.tier, {})[part.owner] = part.n_bytes
    return found
