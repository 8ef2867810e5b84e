"""What the gateway remembers of memory: samples of who told, the oldest gone first."""

import json
from typing import Any

from common.messages.liveness import MemoryPart
from gateway.core.roster import WorkerState
from gateway.memory_history import KEPT_SAMPLES, MemoryHistory
from tests.gateway.core.builders import member, report


def state(name: str, *parts: tuple[str, str, int]) -> WorkerState:
    memory = tuple(MemoryPart(owner=owner, tier=tier, n_bytes=n_bytes) for owner, tier, n_bytes in parts)
    return WorkerState(member(name), "ready", "", 0.0, report(name, memory=memory), 0)


def samples(history: MemoryHistory) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(history.page())["samples"]
    return found


def test_a_sample_has_every_worker_that_told_tier_by_tier() -> None:
    silent = WorkerState(member("decode-1"), "connecting", "", 0.0, None, 0)
    told = state("decode-0", ("weights", "device", 7), ("kv_free", "device", 9), ("parked", "host", 3))
    history = MemoryHistory(lambda: [told, silent, state("decode-2")], lambda: 1234)
    assert samples(history) == []
    history.take()
    tiers = {"device": {"weights": 7, "kv_free": 9}, "host": {"parked": 3}}
    assert samples(history) == [{"unix_ms": 1234, "workers": {"decode-0": tiers}}]


def test_the_oldest_samples_go_first() -> None:
    times = iter(range(KEPT_SAMPLES + 5))
    history = MemoryHistory(list, lambda: next(times))
    for _ in range(KEPT_SAMPLES + 5):
        history.take()
    assert [sample["unix_ms"] for sample in samples(history)] == list(range(5, KEPT_SAMPLES + 5))
