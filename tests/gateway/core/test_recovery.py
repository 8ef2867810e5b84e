"""Laws of requests that fail: tried again elsewhere before the first token, replayed after it, within limits."""

import pytest

from common.errors import PeerFailed
from common.ids import RequestId
from common.messages.liveness import PageCounts, Welcome
from common.policy.routing import Router
from gateway.core.actions import Action, Deliver
from gateway.core.failure import WorkerFailed
from gateway.core.recovery import RetryBudget, RetryTerms, backoff_ms
from tests.gateway.core.builders import (
    cancels,
    delivered,
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

NAMES = ("prefill-0", "prefill-1", "decode-0", "decode-1")
SOON_MS = 100.0  # later than the longest backoff before a first retry
RETRY = RetryTerms(wait_ms=1_000.0)


def test_a_failure_before_the_first_token_is_tried_elsewhere_under_another_name() -> None:
    core = dispatch(*NAMES, retry=RETRY)
    ((first, generate),) = generates(core.submit([order()], 0.0))
    actions = core.on_message(first, failed(), 1.0)
    assert (ends(actions), cancels(actions)) == ([], [peer(str(generate.decode))])
    assert core.open_requests == 1
    ((second, again),) = generates(core.on_tick(SOON_MS))
    assert second != first
    assert again.request != generate.request
    assert (again.prompt, again.emitted, again.timeout_ms) == (generate.prompt, (), 60_000 - SOON_MS)


def test_a_failure_after_some_tokens_is_replayed_and_the_client_sees_no_seam() -> None:
    core = dispatch(*NAMES, retry=RETRY)
    ((_, generate),) = generates(core.submit([order()], 0.0))
    decode = peer(str(generate.decode))
    out = delivered(core.on_message(decode, tokens(0, 5, 6), 1.0))
    core.on_message(decode, failed(code="peer_failed", phase="decode"), 2.0)
    ((_, replay),) = generates(core.on_tick(SOON_MS))
    assert replay.emitted == (5, 6)
    assert replay.decode != generate.decode
    other, wire = peer(str(replay.decode)), str(replay.request)
    last = core.on_message(other, tokens(2, 7, 8, finish="length", request=wire), 200.0)
    assert out + delivered(last) == [5, 6, 7, 8]
    assert [a.request for a in last if isinstance(a, Deliver)] == ["r"], "under the name that the client knows"
    assert core.open_requests == 0
    core.check()


def test_late_tokens_of_a_former_attempt_are_not_believed() -> None:
    core = dispatch(*NAMES, retry=RETRY)
    ((_, generate),) = generates(core.submit([order()], 0.0))
    decode = peer(str(generate.decode))
    core.on_message(decode, failed(code="peer_failed"), 1.0)
    late = core.on_message(decode, tokens(0, 9), 2.0)
    assert (delivered(late), cancels(late)) == ([], [decode])
    core.on_tick(SOON_MS)
    assert delivered(core.on_message(decode, tokens(0, 9), SOON_MS)) == []


def test_a_dead_workers_requests_go_on_elsewhere() -> None:
    core = dispatch(*NAMES, retry=RETRY)
    ((_, generate),) = generates(core.submit([order()], 0.0))
    name = str(generate.decode)
    core.on_message(peer(name), tokens(0, 5), 1.0)
    others = [member(n) for n in NAMES if n != name]
    assert not ends(core.on_members([*others, member(name, incarnation=2)], 2.0))
    ((_, replay),) = generates(core.on_tick(SOON_MS))
    assert (replay.emitted, replay.decode != name) == ((5,), True)


def test_what_cannot_be_healed_is_not_tried_again() -> None:
    core = dispatch(*NAMES, retry=RETRY)
    ((first, _),) = generates(core.submit([order()], 0.0))
    actions = core.on_message(first, failed(code="out_of_pages", retryable=False), 1.0)
    (end,) = ends(actions)
    assert first not in cancels(actions), "it gave up itself"
    assert isinstance(end.error, WorkerFailed) and not end.error.retryable
    core.check()


@pytest.mark.parametrize("too_small", ["decode", "prefill"])
def test_what_one_worker_can_never_hold_is_tried_at_a_larger_one_and_nowhere_else(too_small: str) -> None:
    """Sizes differ: workers are resized one by one, and devices are not all alike."""
    core = dispatch(*NAMES, retry=RETRY)
    ((first, generate),) = generates(core.submit([order()], 0.0))
    small = first.partition("@")[0] if too_small == "prefill" else str(generate.decode)
    larger = next(name for name in NAMES if name.startswith(too_small) and name != small)
    for name in NAMES:
        core.on_message(peer(name), report(name, pages=PageCounts(total=200 if name == larger else 100)), 1.0)
    phase = "queue" if too_small == "prefill" else "grant"
    assert not ends(core.on_message(first, failed(code="out_of_pages", retryable=False, phase=phase), 2.0))
    ((second, again),) = generates(core.on_tick(SOON_MS))
    assert larger in (second.partition("@")[0], again.decode) and small not in (second.partition("@")[0], again.decode)
    end = ends(core.on_message(second, failed(again.request, "out_of_pages", retryable=False, phase=phase), SOON_MS))
    assert isinstance(end[0].error, WorkerFailed) and end[0].error.http_status == 400
    core.check()


def test_tries_are_limited_and_new_tokens_begin_the_count_again() -> None:
    core = dispatch(*NAMES, retry=RetryTerms(attempts=3))
    ((_, generate),) = generates(core.submit([order(max_tokens=100)], 0.0))
    now_ms = 0.0

    def fail() -> list[Action]:
        """The decode worker gives up; what comes of it, a second later."""
        nonlocal now_ms, generate
        actions = core.on_message(peer(str(generate.decode)), failed(str(generate.request)), now_ms)
        now_ms += 1000.0
        for name in NAMES:
            core.on_message(peer(name), report(name), now_ms)
        again = generates(core.on_tick(now_ms))
        generate = again[0][1] if again else generate
        return actions

    for position in range(4):
        assert not ends([*fail(), *fail()])
        decode, wire = peer(str(generate.decode)), str(generate.request)
        assert delivered(core.on_message(decode, tokens(position, 7, request=wire), now_ms)) == [7]
    assert not ends([*fail(), *fail()])
    assert "gave up in phase grant of a replay after 4 tokens" in str(ends(fail())[0].error)
    core.check()


def test_a_request_that_kills_its_workers_does_not_go_round() -> None:
    core = dispatch("mixed-0", retry=RetryTerms(attempts=99, wait_ms=1e9))
    core.submit([order()], 0.0)
    for life in range(2, 6):
        actions = core.on_members([member("mixed-0", incarnation=life)], float(life))
        if life < 5:
            assert not ends(actions)
            core.on_message(peer("mixed-0", life), welcome(life), float(life))
            now_ms = life * 1000.0
            core.on_message(peer("mixed-0", life), report("mixed-0"), now_ms)
            assert generates(core.on_tick(now_ms))
    assert "was restarted" in str(ends(actions)[0].error)
    core.check()


def welcome(life: int):
    return Welcome(member=member("mixed-0", life))


def test_with_nobody_left_a_request_waits_for_a_while_and_then_says_why() -> None:
    core = dispatch("prefill-0", "decode-0", retry=RETRY)
    core.submit([order()], 0.0)
    core.on_members([member("prefill-0"), member("decode-0", incarnation=2)], 1.0)
    core.on_message(peer("prefill-0"), report("prefill-0"), 500.0)
    assert ends(core.on_tick(500.0)) == []
    core.on_message(peer("prefill-0"), report("prefill-0"), 1_100.0)
    (end,) = ends(core.on_tick(1_100.0))
    assert isinstance(end.error, PeerFailed)
    assert "decode-0 was restarted" in str(end.error) and "decode: 0 of 1 ready" in str(end.error)
    core.check()


def test_a_worker_that_comes_back_in_time_takes_over() -> None:
    core = dispatch("prefill-0", "decode-0", retry=RETRY)
    core.submit([order()], 0.0)
    core.on_message(peer("decode-0"), tokens(0, 5), 0.0)
    core.on_members([member("prefill-0"), member("decode-0", incarnation=2)], 1.0)
    core.on_message(peer("decode-0", 2), Welcome(member=member("decode-0", 2)), 300.0)
    core.on_message(peer("prefill-0"), report("prefill-0"), 300.0)
    ((to, replay),) = generates(core.on_tick(400.0))
    assert (to, replay.decode, replay.emitted) == (peer("prefill-0"), "decode-0", (5,))


def test_the_client_can_leave_between_two_attempts() -> None:
    core = dispatch(*NAMES, retry=RETRY)
    ((first, _),) = generates(core.submit([order()], 0.0))
    core.on_message(first, failed(), 1.0)
    core.cancel(RequestId("r"), 2.0)
    assert generates(core.on_tick(SOON_MS)) == []
    assert core.open_requests == 0
    core.check()


def test_a_gap_in_the_tokens_is_healed_by_a_replay_elsewhere() -> None:
    core = dispatch(*NAMES, retry=RETRY, router=Router(decode="session", local_prefill_tokens=0))
    ((_, generate),) = generates(core.submit([order(session="s")], 0.0))
    decode = peer(str(generate.decode))
    core.on_message(decode, tokens(0, 5), 0.0)
    assert delivered(core.on_message(decode, tokens(2, 7), 0.0)) == []
    ((_, replay),) = generates(core.on_tick(SOON_MS))
    assert (replay.emitted, replay.decode != generate.decode) == ((5,), True)


def test_a_storm_of_failures_ends_when_the_budget_is_spent() -> None:
    budget = RetryBudget(RetryTerms(budget_share=0.5, budget_burst=3.0))
    assert [budget.take() for _ in range(4)] == [True, True, True, False]
    budget.on_request()
    assert not budget.take()
    budget.on_request()
    assert budget.take()
    for _ in range(100):
        budget.on_request()
    assert [budget.take() for _ in range(4)] == [True, True, True, False], "a quiet hour saves no more than one burst"


@pytest.mark.parametrize("draw", [0.0, 0.5, 0.999])
def test_waits_double_up_to_a_limit_and_are_spread(draw: float) -> None:
    terms = RetryTerms(backoff_ms=10.0, longest_ms=50.0)
    assert [backoff_ms(terms, n, draw) / (0.5 + draw) for n in (2, 3, 4, 5, 6)] == [10.0, 20.0, 40.0, 50.0, 50.0]


def test_local_prefill_is_counted_with_its_reason() -> None:
    core = dispatch("decode-0", router=Router(fallback=True))
    ((to, generate),) = generates(core.submit([order(prompt_tokens=100)], 0.0))
    assert (to, generate.decode) == (peer("decode-0"), None)
    assert core.counters()["local_prefills_total{reason=no-prefill-worker}"] == 1


def test_a_death_that_takes_many_down_does_not_start_them_all_again_in_one_tick() -> None:
    core = dispatch("mixed-0", "mixed-1", retry=RETRY, max_open=400)
    for n in range(300):
        core.submit([order(f"r{n}")], 0.0)
    core.on_members([member("mixed-0", 2), member("mixed-1")], 1.0)
    started = [len(generates(core.on_tick(SOON_MS + n))) for n in range(4)]
    assert started == [64, 64, 22, 0]
    core.check()


@pytest.mark.parametrize(("share", "ended"), [(0.0, ["b"]), (1.0, [])])
def test_each_failure_takes_from_the_budget_and_each_request_brings_its_share(share: float, ended: list[str]) -> None:
    core = dispatch("mixed-0", "mixed-1", retry=RetryTerms(budget_burst=1.0, budget_share=share))
    actions: list[Action] = []
    for name in ("a", "b"):
        ((to, _),) = generates(core.submit([order(name)], 0.0))
        actions += core.on_message(to, failed(name), 0.0)
    assert [end.request for end in ends(actions)] == ended
    assert core.counters().get("retries_refused_total{reason=budget}", 0) == len(ended)


def test_a_death_takes_nothing_from_the_budget() -> None:
    core = dispatch("mixed-0", retry=RetryTerms(budget_burst=0.0, budget_share=0.0))
    core.submit([order("a")], 0.0)
    core.submit([order("b")], 0.0)
    assert ends(core.on_members([member("mixed-0", 2)], 1.0)) == []
    assert core.open_requests == 2


def test_retries_are_counted_by_reason_and_by_what_the_client_had() -> None:
    core = dispatch(*NAMES, retry=RETRY)
    for name, code in (("a", "busy"), ("b", "internal")):
        ((_, generate),) = generates(core.submit([order(name)], 0.0))
        decode = peer(str(generate.decode))
        if name == "b":
            core.on_message(decode, tokens(0, 7, request=name), 0.0)
        core.on_message(decode, failed(name, code), 0.0)
    counted = {series for series in core.counters() if series.startswith("retries")}
    assert counted == {"retries_total{code=busy,kind=retry}", "retries_total{code=internal,kind=replay}"}


def test_a_worker_asked_for_by_name_is_not_waited_for_once_it_failed() -> None:
    core = dispatch(*NAMES, retry=RETRY)
    ((_, generate),) = generates(core.submit([order(decode_rule="worker=decode-1", max_tokens=9)], 0.0))
    assert generate.decode == "decode-1"
    core.on_message(peer("decode-1"), tokens(0, 5), 1.0)
    core.on_members([member(name) for name in NAMES if name != "decode-1"] + [member("decode-1", incarnation=2)], 2.0)
    ((_, replay),) = generates(core.on_tick(SOON_MS))
    assert (replay.decode, replay.emitted) == ("decode-0", (5,))


def test_failed_attempts_are_remembered_for_the_next_one_and_only_the_latest_eight() -> None:
    core = dispatch(*NAMES, retry=RetryTerms(attempts=11, wait_ms=1e9))
    ((_, generate),) = generates(core.submit([order()], 0.0))
    now_ms = 0.0
    for attempt in range(2, 12):
        worker = str(generate.decode)
        assert core.on_message(peer(worker), failed(str(generate.request)), now_ms + 5.0)
        now_ms += 2000.0
        for name in NAMES:
            core.on_message(peer(name), report(name), now_ms)
        ((_, generate),) = generates(core.on_tick(now_ms))
        begun = core.begun(generate.request)
        assert begun is not None
        latest = begun.failed[-1]
        assert (latest.code, latest.phase, latest.worker, latest.ms) == ("busy", "grant", worker.partition("@")[0], 5.0)
        assert len(begun.failed) == min(8, attempt - 1)
    (end,) = ends(core.on_message(peer(str(generate.decode)), failed(str(generate.request)), now_ms))
    assert end.error.attempts == 11
