"""Laws of too much work: bounded, most urgent first, limited per key, and everything that waits is answered."""

import random

import pytest

from common.errors import Busy, InvalidRequest, NoWorker, RateLimited, ServingError
from common.ids import RequestId
from common.messages.liveness import QueueCounts, Welcome
from common.policy.urgency import PRIORITY_MS
from gateway.core.keys import KeyLimits, KeyTerms
from gateway.core.open_request import OpenRequest
from gateway.core.waiting import WaitingRoom
from tests.gateway.core.builders import (
    TIMEOUT_MS,
    dispatch,
    ends,
    failed,
    generates,
    member,
    order,
    peer,
    report,
    tokens,
)


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


def test_a_key_that_was_idle_has_saved_one_minute_and_no_more() -> None:
    keys = KeyLimits({"k": KeyTerms(name="k", requests_per_minute=60)})
    keys.admit("k", 60, 1, 3_600_000.0)
    with pytest.raises(RateLimited):
        keys.admit("k", 1, 1, 3_600_000.0)


def test_a_keys_priority_is_added_to_its_requests() -> None:
    core = dispatch("mixed-0", keys={"k": KeyTerms(name="k", priority=-7)})
    ((_, generate),) = generates(core.submit([order("a", key="k", priority=2)], 0.0))
    assert generate.priority == -5


@pytest.mark.parametrize(
    ("work_ms", "retry_after_s"), [((25_000.0, 30_000.0), 25.0), ((300.0, 9e9), 1.0), ((9e9, 9e9), 60.0)]
)
def test_who_is_refused_shall_come_back_when_the_least_loaded_worker_is_done(
    work_ms: tuple[float, float], retry_after_s: float
) -> None:
    core = dispatch("mixed-0", "mixed-1", "kvstore-0", max_open=1, max_waiting=1)
    core.submit([order("a")], 0.0)
    core.on_message(peer("mixed-0"), tokens(0, 7, request="a"), 0.0)
    for name, queued_ms in zip(("mixed-0", "mixed-1"), work_ms, strict=True):
        core.on_message(peer(name), report(name, queue=QueueCounts(work_ms=queued_ms)), 0.0)
    core.submit([order("b")], 0.0)
    with pytest.raises(Busy) as refused:
        core.submit([order("c")], 0.0)
    assert refused.value.retry_after_s == pytest.approx(retry_after_s)
    (end,) = ends(core.submit([order("d", priority=-1)], 0.0))
    assert isinstance(end.error, Busy) and end.error.retry_after_s == pytest.approx(retry_after_s)


@pytest.mark.parametrize(("later_ms", "first"), [(2 * PRIORITY_MS - 1, "urgent"), (2 * PRIORITY_MS + 1, "patient")])
def test_two_steps_of_priority_are_worth_two_seconds_of_waiting_and_nobody_waits_for_ever(
    later_ms: float, first: str
) -> None:
    core = dispatch("mixed-0", max_open=1, max_waiting=9)
    core.submit([order("a")], 0.0)
    core.submit([order("patient", priority=2)], 0.0)
    core.submit([order("urgent", priority=0)], later_ms)
    ((_, generate),) = generates(finish(core, "a", later_ms))
    assert generate.request == first


def test_turns_are_those_of_a_sorted_list_whoever_comes_and_goes() -> None:
    rng, room, waiting = random.Random(1), WaitingRoom(50), list[OpenRequest]()
    for n in range(3_000):
        one = OpenRequest(order(f"r{n}"), float(n), 1.0, rng.randrange(-9, 9))
        waiting = sorted([*waiting, one], key=lambda w: w.arrived_ms + w.priority * PRIORITY_MS)
        assert room.add(one) is (waiting.pop() if len(waiting) > 50 else None)
        while waiting and rng.random() < 0.52:
            assert room.first() is waiting[0]
            gone = waiting.pop(rng.choice([0, -1]))
            assert room.remove(gone.request)
            assert not room.remove(gone.request)
        room.check()


def test_a_room_that_many_pass_through_remembers_only_those_who_wait() -> None:
    room = WaitingRoom(4)
    room.add(OpenRequest(order("stays", priority=-9), 0.0, 1.0, -9))
    for n in range(2_000):
        assert room.add(OpenRequest(order(f"r{n}"), float(n), 1.0, 0)) is None
        assert room.remove(RequestId(f"r{n}"))
        room.check()
    assert (len(room), room.first().request) == (1, "stays")  # type: ignore[union-attr]


def test_those_who_wait_go_on_waiting_while_nobody_is_ready_and_start_when_somebody_is() -> None:
    core = dispatch("mixed-0", max_open=1, max_waiting=3)
    core.submit([order("a")], 0.0)
    core.submit([order("b")], 0.0)
    assert [end.request for end in ends(core.on_members([member("mixed-0", 2)], 1.0))] == ["a"]
    assert core.submit([order("c")], 2.0) == [], "behind those who wait"
    assert (core.on_tick(50.0), core.waiting_requests) == ([], 2)
    core.on_message(peer("mixed-0", 2), Welcome(member=member("mixed-0", 2)), 60.0)
    ((to, generate),) = generates(core.on_tick(100.0))
    assert (to, generate.request) == (peer("mixed-0", 2), "b")
    core.check()


def test_who_waits_for_something_impossible_ends_alone() -> None:
    core = dispatch("mixed-0", max_open=1, max_waiting=3, keys={"k": KeyTerms(name="k", max_inflight=3)})
    core.submit([order("a")], 0.0)
    core.submit([order("bad", prefill_rule="best", key="k")], 0.0)
    core.submit([order("good", key="k")], 0.0)
    actions = finish(core, "a")
    assert [end.request for end in ends(actions)] == ["bad"]
    assert [generate.request for _, generate in generates(actions)] == ["good"]
    core.check()


KEYS = {"k": KeyTerms(name="k", max_inflight=3, requests_per_minute=4, tokens_per_minute=48)}


def batch(n: int, name: str = "r") -> list:
    """Each of them is 12 tokens."""
    return [order(f"{name}{index}", key="k") for index in range(n)]


@pytest.mark.parametrize(
    ("names", "n", "error"),
    [(("mixed-0",), 4, InvalidRequest), (("mixed-0",), 3, RateLimited), (("prefill-0",), 2, NoWorker)],
)
def test_a_batch_that_is_refused_was_never_there(names: tuple[str, ...], n: int, error: type[ServingError]) -> None:
    core = dispatch(*names, keys=KEYS)
    if error is RateLimited:
        core.submit(batch(1, "before"), 0.0)
    with pytest.raises(error):
        core.submit(batch(n), 0.0)
    core.check()
    core.on_members([member("mixed-0")], 0.0)
    core.on_message(peer("mixed-0"), Welcome(member=member("mixed-0")), 0.0)
    left = 4 - core.open_requests
    core.submit(batch(min(left, 3 - core.open_requests), "after"), 0.0)
    core.check()


def test_a_refused_batch_gets_its_rates_back_and_an_admitted_one_pays_for_every_prompt() -> None:
    core = dispatch("prefill-0", keys=KEYS)
    for n in range(9):
        with pytest.raises(NoWorker):
            core.submit(batch(3, f"r{n}-"), 0.0)
    core.on_members([member("mixed-0")], 0.0)
    core.on_message(peer("mixed-0"), Welcome(member=member("mixed-0")), 0.0)
    assert len(generates(core.submit(batch(3), 0.0))) == 3
    for n in range(3):
        core.cancel(RequestId(f"r{n}"), 0.0)
    core.submit(batch(1, "last"), 0.0)
    with pytest.raises(RateLimited, match="requests per minute"):
        core.submit(batch(1, "more"), 0.0)


def test_a_batch_pays_the_tokens_of_all_its_prompts() -> None:
    core = dispatch("mixed-0", keys={"k": KeyTerms(name="k", tokens_per_minute=48)})
    core.submit(batch(3), 0.0)
    core.submit(batch(1, "last"), 0.0)
    with pytest.raises(RateLimited, match="tokens per minute"):
        core.submit(batch(1, "more"), 0.0)


def test_of_a_batch_that_finds_too_few_places_the_rest_ends_one_by_one() -> None:
    core = dispatch("mixed-0", keys=KEYS, max_open=1, max_waiting=1)
    actions = core.submit(batch(3), 0.0)
    assert [generate.request for _, generate in generates(actions)] == ["r0"]
    assert [(end.request, end.error.code) for end in ends(actions)] == [("r2", Busy.code)]
    assert (core.open_requests, core.waiting_requests) == (2, 1)
    core.check()


def test_everybody_who_is_sent_away_is_counted_with_the_reason() -> None:
    core = dispatch("mixed-0", max_open=1, max_waiting=1, keys={"k": KeyTerms(name="k", max_inflight=1)})
    core.submit([order("a", key="k")], 0.0)
    core.submit([order("b", priority=1)], 0.0)
    core.submit([order("c")], 0.0)
    for refused in (order("d"), order("e", key="k")):
        with pytest.raises(ServingError):
            core.submit([refused], 0.0)
    core.on_tick(30_000.0)
    shed = {name: count for name, count in core.counters().items() if name.startswith("shed")}
    assert shed == {
        "shed_total{reason=queue-full}": 2,
        "shed_total{reason=key-limit}": 1,
        "shed_total{reason=waited-too-long}": 1,
    }


@pytest.mark.parametrize("way", ["finished", "cancelled", "failed", "out of time"])
def test_a_place_that_becomes_free_is_taken_at_once(way: str) -> None:
    core = dispatch("mixed-0", max_open=1, max_waiting=3)
    core.submit([order("a")], 0.0)
    now_ms = TIMEOUT_MS if way == "out of time" else 0.0
    core.submit([order("b")], now_ms)
    core.on_message(peer("mixed-0"), report("mixed-0"), now_ms)
    match way:
        case "finished":
            actions = finish(core, "a")
        case "cancelled":
            actions = core.cancel(RequestId("a"), 0.0)
        case "failed":
            actions = core.on_message(peer("mixed-0"), failed("a"), 0.0)
        case _:
            actions = core.on_tick(now_ms)
    assert [generate.request for _, generate in generates(actions)] == ["b"]
