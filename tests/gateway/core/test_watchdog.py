"""Requests that no rule will ever end are found, once they were so at two looks; all others are left alone."""

from common.ids import RequestId, WorkerId
from gateway.core.open_request import OpenRequest
from gateway.core.watchdog import RequestWatch
from tests.gateway.core.builders import dispatch, generates, order, peer, report

R = RequestId("r")


def request(**more: object) -> OpenRequest:
    return OpenRequest(order(), arrived_ms=0.0, deadline_ms=1_000.0, priority=0, **more)  # type: ignore[arg-type]


def found(one: OpenRequest, now_ms: float) -> list[RequestId]:
    watch = RequestWatch()
    assert watch.look([R], [one], now_ms) == []
    return [stuck.request for stuck in watch.look([R], [one], now_ms)]


def test_who_is_past_its_deadline_and_still_here_is_stuck_and_who_is_a_little_late_is_not() -> None:
    assert found(request(), 6_001.0) == [R]
    assert found(request(), 5_999.0) == []


def test_without_workers_there_must_be_a_time_for_the_next_try() -> None:
    assert found(request(attempts_total=1), 10.0) == [R]
    assert found(request(attempts_total=1, retry_at_ms=20.0), 10.0) == []
    assert found(request(attempts_total=0), 10.0) == []  # it waits for a place


def test_a_client_that_waits_for_a_request_that_nobody_knows_is_answered_at_the_second_look() -> None:
    core = dispatch("mixed-0")
    core.submit([order()], 0.0)
    assert core.stuck([R], 0.0) == core.stuck([R], 0.0) == []
    lost = RequestId("lost")
    assert core.stuck([R, lost], 0.0) == []
    assert [one.request for one in core.stuck([R, lost], 0.0)] == [lost]
    assert core.counters()["watchdog_fired_total"] == 1.0


def test_the_state_tells_whom_a_request_waits_for() -> None:
    core = dispatch("mixed-0")
    core.submit([order()], 0.0)
    (told,) = core.state(7.0)["requests"]
    assert (told["phase"], told["age_ms"], told["waits_for"]) == ("prefill", 7, [peer("mixed-0")])


def test_a_degraded_worker_is_passed_over_while_another_can_serve_and_used_when_none_can() -> None:
    core = dispatch("mixed-0", "mixed-1")
    core.on_message(peer("mixed-0"), report("mixed-0", degraded="it stood still"), 0.0)
    sent = [generates(core.submit([order(f"r{i}")], 0.0))[0][0] for i in range(4)]
    assert set(sent) == {peer("mixed-1")}
    core.drain(WorkerId("mixed-1"), on=True)
    assert generates(core.submit([order("last")], 0.0))[0][0] == peer("mixed-0")
