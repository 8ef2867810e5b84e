"""Laws of too much work: bounded, most urgent first, limited per key, and everything that waits is answered."""

import random

import pytest

from common.errors import Busy, RateLimited
from common.ids import RequestId
from gateway.core.keys import KeyLimits, KeyTerms
from tests.gateway.core.builders import dispatch, ends, generates, order, peer, report, tokens


def finish(core, name: str, now_ms: float = 0.0):
    return core.on_message(peer("mixed-0"), tokens(0, 7, finish="length", request=name), now_ms)


def test_those_who_wait_are_served_by_urgency_then_by_arrival() -> None:
    core = dispatch("mixed-0", max_open=1, max_waiting=9)
    core.submit([order("a")], 0.0)
    for name, priority in (("b", 5), ("c", 0), ("d", -1), ("e", 0)):
        assert core.submit([order(name, priority=priority)], 0.0) == []
    served, now = [], "a"
    while started := generates(finish(core, now)):
        now = started[0][1].request
        served.append((now, started[0][1].priority))
    assert served == [("d", -1), ("c", 0), ("e", 0), ("b", 5)]
    core.check()


def test_a_full_room_refuses_the_least_urgent_and_says_when_to_come_back() -> None:
    core = dispatch("mixed-0", max_open=1, max_waiting=2)
    for name, priority in (("a", 0), ("b", 1), ("c", 3)):
        core.submit([order(name, priority=priority)], 0.0)
    with pytest.raises(Busy) as refused:
        core.submit([order("d", priority=3)], 0.0)
    assert refused.value.retry_after_s is not None and refused.value.retry_after_s >= 1
    (end,) = ends(core.submit([order("e", priority=2)], 0.0))
    assert (end.request, end.error.http_status) == ("c", 503)
    assert core.open_requests == 3


def test_nobody_waits_for_ever() -> None:
    core = dispatch("mixed-0", max_open=1, max_waiting=2)
    core.submit([order("a")], 0.0)
    core.submit([order("b")], 0.0)
    core.on_message(peer("mixed-0"), report("mixed-0"), 30_000.0)
    assert [end.request for end in ends(core.on_tick(30_000.0))] == ["b"]
    assert core.waiting_requests == 0


def test_a_client_that_leaves_the_room_leaves_no_trace() -> None:
    core = dispatch("mixed-0", max_open=1, max_waiting=2, keys={"k": KeyTerms(name="k", max_inflight=2)})
    core.submit([order("a", key="k")], 0.0)
    core.submit([order("b", key="k")], 0.0)
    with pytest.raises(RateLimited):
        core.submit([order("c", key="k")], 0.0)
    core.cancel(RequestId("b"), 0.0)
    core.submit([order("c", key="k")], 0.0)
    core.cancel(RequestId("c"), 0.0)
    assert generates(finish(core, "a")) == []
    core.check()


def test_a_key_has_so_many_requests_at_once() -> None:
    keys = KeyLimits({"k": KeyTerms(name="k", max_inflight=2)})
    keys.admit("k", 1, 1, 0.0)
    keys.admit("k", 1, 1, 0.0)
    with pytest.raises(RateLimited, match="limit is 2"):
        keys.admit("k", 1, 1, 0.0)
    keys.admit("other", 1, 10**9, 0.0)
    keys.release("k")
    keys.admit("k", 1, 1, 0.0)


def test_rates_refill_with_time_and_a_refusal_says_how_long_that_takes() -> None:
    keys = KeyLimits({"k": KeyTerms(name="k", requests_per_minute=60, tokens_per_minute=600)})
    keys.admit("k", 1, 600, 0.0)
    with pytest.raises(RateLimited) as refused:
        keys.admit("k", 1, 100, 0.0)
    assert refused.value.retry_after_s == pytest.approx(10.0)
    assert (refused.value.http_status, refused.value.code) == (429, "rate_limit_exceeded")
    with pytest.raises(RateLimited):
        keys.admit("k", 1, 100, 9_999.0)
    keys.admit("k", 1, 100, 10_001.0)


def test_a_request_larger_than_a_keys_minute_passes_once_and_is_paid_for() -> None:
    keys = KeyLimits({"k": KeyTerms(name="k", tokens_per_minute=100)})
    keys.admit("k", 1, 300, 0.0)
    with pytest.raises(RateLimited):
        keys.admit("k", 1, 1, 120_000.0)
    keys.admit("k", 1, 1, 121_000.0)


@pytest.mark.parametrize("seed", range(20))
def test_a_key_never_uses_more_than_its_rate(seed: int) -> None:
    rng, now_ms, used = random.Random(seed), 0.0, 0
    keys = KeyLimits({"k": KeyTerms(name="k", requests_per_minute=30)})
    while now_ms < 300_000.0:
        now_ms += rng.choice([0.0, 10.0, 5_000.0])
        try:
            keys.admit("k", 1, 1, now_ms)
            used += 1
        except RateLimited:
            continue
    assert used <= 30 + now_ms / 60_000.0 * 30 + 1


def test_a_keys_priority_is_added_to_its_requests() -> None:
    core = dispatch("mixed-0", keys={"k": KeyTerms(name="k", priority=-7)})
    ((_, generate),) = generates(core.submit([order("a", key="k", priority=2)], 0.0))
    assert generate.priority == -5
