"""Every way a request can end on a worker: what is said, to whom, and that nothing stays behind."""

import random

import msgspec

from common.ids import Incarnation, RequestId, WorkerId, peer_id
from common.messages.actions import Send
from common.messages.handover import GrantRequest
from common.messages.liveness import Member, Welcome
from common.messages.requests import Sampling, Timings, TokenDelta, Tokens
from common.policy.succession import STAYS_MS
from tests.support.fake_engine import answer
from tests.support.world import GATEWAY, SILENT_MS, World

R = RequestId("r")


def world(*, decode_pages: int = 400, transport: str = "shm") -> World:
    made = World(random.Random(11), prefill_pages=200, decode_pages=decode_pages, transport=transport)
    made.greet()
    return made


def run_until(target: World, condition, turns: int = 5_000) -> None:
    for _ in range(turns):
        if condition():
            return
        if not target.turn():
            target.pass_time(50.0)
    raise AssertionError("the condition never held")


def prompt(tokens: int) -> list[int]:
    return list(range(5, 5 + tokens))


def test_a_stop_token_ends_the_answer_and_is_its_last_token() -> None:
    target = world()
    expected = answer(prompt(6), 10)
    target.send("r", prompt(6), 10, stop_token_ids=(expected[3],))
    target.settle()
    seen = target.answers[R]
    assert (seen.finish, seen.tokens) == ("stop", expected[: expected.index(expected[3]) + 1])


def test_the_first_delta_carries_cached_tokens_and_timings_and_the_second_how_long_it_waited() -> None:
    target = world()
    target.send("r", prompt(6), 4)
    target.settle()
    deltas = target.answers[R].deltas
    assert [(d.cached_tokens is not None, d.timings is not None) for d in deltas] == [
        (True, True),
        (False, True),
        (False, False),
        (False, False),
    ]
    second = deltas[1].timings
    assert second == Timings(decode_queue_ms=second.decode_queue_ms, first_step_ms=second.first_step_ms)


def test_cancelling_a_running_answer_frees_its_pages_before_it_would_have_ended() -> None:
    target = world()
    target.send("r", prompt(6), 300)
    run_until(target, lambda: len(target.answers[R].tokens) > 3)
    target.cancel(R)
    target.settle()
    assert len(target.answers[R].tokens) < 300
    assert target.processes["decode"].core.pool.available_pages == 400


def test_cancelling_a_transfer_in_flight_quarantines_its_pages_until_the_writer_has_stopped() -> None:
    target = world()
    target.send("r", prompt(40), 5)
    decode = target.processes["decode"]
    run_until(target, lambda: decode.ledger.counts().granted > 0)
    target.perform(decode, decode.core._on_cancel(R, target.now_ms))  # before the prefill worker hears of it
    assert decode.ledger.counts().quarantined > 0 and decode.ledger.counts().granted == 0
    target.cancel(R)
    target.settle()
    assert decode.core.pool.available_pages == 400


def test_over_tcp_nobody_else_writes_so_nothing_is_quarantined() -> None:
    target = world(transport="tcp")
    target.send("r", prompt(40), 5)
    decode = target.processes["decode"]
    run_until(target, lambda: decode.ledger.counts().granted > 0)
    target.perform(decode, decode.core._on_cancel(R, target.now_ms))
    assert decode.ledger.counts().free == 400


def test_a_cancel_that_overtakes_its_request_still_wins() -> None:
    target = world()
    decode = target.processes["decode"]
    target.perform(decode, decode.core._on_cancel(R, target.now_ms))
    target.send("r", prompt(6), 5)
    target.settle()
    assert target.answers[R].tokens == []
    assert target.answers[R].failed is not None and target.answers[R].failed.code == "cancelled"


def test_answers_of_a_silent_gateway_are_dropped_on_every_worker() -> None:
    target = world()
    target.send("r", prompt(6), 300)
    target.send("waiting", prompt(150), 2)
    run_until(target, lambda: len(target.answers[R].tokens) > 3)
    tokens = len(target.answers[R].tokens)
    target.now_ms += SILENT_MS + 1
    for process in target.processes.values():
        for peer in [p.peer for p in target.processes.values()]:
            process.core._callers.heard(peer, target.now_ms)  # everybody but the gateway spoke
        target.perform(process, process.core.on_tick(target.now_ms))
    run_until(target, lambda: all(p.core.idle for p in target.processes.values()), turns=200)
    assert len(target.answers[R].tokens) < tokens + 20
    assert all(p.core.pool.available_pages == p.ledger.total_pages for p in target.processes.values())


def test_an_answer_out_of_time_says_that_it_was_decoding() -> None:
    target = world()
    target.send("r", prompt(6), 350, timeout_ms=2_000)
    run_until(target, lambda: len(target.answers[R].tokens) > 3)
    target.pass_time(2_500.0)
    target.settle()
    failed = target.answers[R].failed
    assert failed is not None and (failed.code, failed.phase) == ("deadline_exceeded", "decode")


def test_a_prompt_out_of_time_in_the_queue_says_so() -> None:
    target = world(decode_pages=24)
    for number in range(5):
        target.send(f"r{number}", prompt(30), 5, timeout_ms=2_000)
    prefill = target.processes["prefill"]
    run_until(target, lambda: prefill.core.report(0, 0.0).queue.waiting >= 2)
    target.now_ms += 2_500.0
    target.perform(prefill, prefill.core.on_tick(target.now_ms))
    target.settle()
    phases = {a.failed.phase for a in target.answers.values() if a.failed is not None}
    assert "prefill_queue" in phases


def test_no_more_than_two_prompts_wait_for_pages_at_once() -> None:
    target = world(decode_pages=20)
    decode = target.processes["decode"]
    asked: list[GrantRequest] = []
    hear = decode.core.on_message

    def listen(peer, message, now_ms):
        if isinstance(message, GrantRequest):
            asked.append(message)
            return []  # a decode worker that never has pages
        return hear(peer, message, now_ms)

    decode.core.on_message = listen
    for number in range(6):
        target.send(f"r{number}", prompt(4), 4)
    while target.turn():
        pass
    assert len({request.transfer for request in asked}) == 2


def test_a_newer_incarnation_of_a_decode_worker_ends_what_the_old_one_had() -> None:
    target = world(decode_pages=20)
    target.send("r", prompt(30), 5)
    prefill = target.processes["prefill"]
    target.processes["decode"].alive = False  # without a word, and before its silence is noticed
    run_until(target, lambda: prefill.step is None and not prefill.copies and not any(target.links.values()))
    newer = Member(id=WorkerId("decode-0"), role="decode", incarnation=Incarnation(77), endpoint="y", host="h", pid=2)
    target.perform(prefill, prefill.core.on_members([newer], target.now_ms, target.now_ms))
    while target.turn():
        pass
    failed = target.answers[R].failed
    assert failed is not None and failed.retryable and "decode-0" in failed.text
    assert prefill.core.pool.available_pages == 200


def test_a_worker_that_hears_late_of_a_newer_life_counts_from_when_that_was_read() -> None:
    core = world().processes["prefill"].core
    newer = msgspec.structs.replace(
        core._mine, incarnation=Incarnation(77), joined_unix_ms=core._mine.joined_unix_ms + 1
    )
    for read_ms in (0.0, 500.0, STAYS_MS):
        assert not core.succession.over
        core.on_members([newer], 3 * STAYS_MS, read_ms)
    assert core.succession.over


def test_a_prompt_for_an_unknown_decode_worker_fails_by_name_after_a_moment() -> None:
    target = world()
    message = target.generate("r", prompt(4), Sampling(max_tokens=2), decode="decode-9")
    target.post(GATEWAY, target.processes["prefill"].peer, message)
    while target.turn():
        pass
    assert target.answers[R].failed is None
    target.pass_time(2_500.0)
    while target.turn():
        pass
    failed = target.answers[R].failed
    assert failed is not None and failed.code == "no_worker" and "decode-9" in failed.text


def test_a_draining_worker_finishes_what_it_has_and_takes_nothing_new() -> None:
    target = world()
    target.send("r", prompt(6), 40)
    run_until(target, lambda: len(target.answers[R].tokens) > 3)
    for process in target.processes.values():
        process.core.drain()
        assert process.core.report(1, 0.0).draining
    target.send("late", prompt(6), 5)
    target.settle()
    assert target.answers[R].tokens == answer(prompt(6), 40)
    failed = target.answers[RequestId("late")].failed
    assert failed is not None and failed.retryable and "draining" in failed.text


def silence_the_gateway(target: World) -> None:
    """Everybody but the gateway is heard, and time passes."""
    target.now_ms += SILENT_MS + 1
    for process in target.processes.values():
        for peer in [p.peer for p in target.processes.values()]:
            process.core._callers.heard(peer, target.now_ms)
        target.perform(process, process.core.on_tick(target.now_ms))


def test_a_gateway_that_only_paused_is_told_that_its_requests_are_gone() -> None:
    target = world()
    target.send("r", prompt(6), 300)
    run_until(target, lambda: len(target.answers[R].tokens) > 3)
    silence_the_gateway(target)
    target.settle()
    failed = target.answers[R].failed
    assert failed is not None and failed.retryable and "silent" in failed.text


def test_a_silent_gateway_with_running_and_unreachable_prompts_breaks_nothing() -> None:
    target = world(decode_pages=20)
    for number in range(3):
        target.send(f"r{number}", prompt(30), 5)
    for number in range(3):
        message = target.generate(f"u{number}", prompt(4), Sampling(max_tokens=2), decode="decode-9")
        target.post(GATEWAY, target.processes["prefill"].peer, message)
    prefill = target.processes["prefill"]
    run_until(target, lambda: len(prefill.core._prompts) == 6)
    silence_the_gateway(target)
    run_until(target, lambda: all(p.core.idle for p in target.processes.values()), turns=2_000)
    assert all(p.core.pool.available_pages == p.ledger.total_pages for p in target.processes.values())


def test_no_prompt_is_started_for_a_decode_worker_just_declared_dead() -> None:
    target = world(decode_pages=20)
    for number in range(6):
        target.send(f"r{number}", prompt(30), 5)
    prefill, decode = target.processes["prefill"], target.processes["decode"]
    run_until(target, lambda: len(prefill.core._prompts) >= 4 and len(prefill.core._queue) >= 1)
    actions = prefill.core.on_peer_dead(decode.peer, target.now_ms)
    asked = [a for a in actions if isinstance(a, Send) and isinstance(a.message, GrantRequest)]
    assert asked == []


def test_a_full_decode_worker_does_not_hold_up_prompts_for_another() -> None:
    target = world(decode_pages=20)
    prefill = target.processes["prefill"]
    other = Member(id=WorkerId("decode-1"), role="decode", incarnation=Incarnation(78), endpoint="z", host="h", pid=3)
    target.members.append(other)
    target.perform(prefill, prefill.core.on_members(target.members, target.now_ms, target.now_ms))
    peer = peer_id(other.id, other.incarnation)
    target.perform(prefill, prefill.core.on_message(peer, Welcome(member=other), target.now_ms))
    decode = target.processes["decode"]
    hear = decode.core.on_message
    decode.core.on_message = lambda p, m, now: [] if isinstance(m, GrantRequest) else hear(p, m, now)  # never grants
    for number in range(4):
        target.send(f"full{number}", prompt(4), 4)
    message = target.generate("r", prompt(4), Sampling(max_tokens=2), decode="decode-1")
    target.post(GATEWAY, prefill.peer, message)
    while target.turn():
        pass
    assert any(isinstance(message, GrantRequest) for message in target.unheard(peer))


def test_a_prompt_that_fills_the_decode_pool_exactly_is_granted() -> None:
    target = world(decode_pages=20)  # ten blocks of four tokens over two layers
    target.send("r", prompt(40), 1)
    target.settle()
    assert target.answers[R].tokens == answer(prompt(40), 1)


def test_no_more_requests_are_granted_than_may_run() -> None:
    target = world()
    for number in range(12):
        target.send(f"r{number}", prompt(4), 60)
    most = 0
    for _ in range(3_000):
        most = max(most, target.processes["decode"].core._scheduler.n_running)
        if not target.turn():
            break
    assert most == 5  # max_running of this world


def test_tokens_that_could_not_be_sent_end_their_request_at_the_next_ping() -> None:
    target = world()
    target.send("r", prompt(6), 300)
    decode = target.processes["decode"]
    run_until(target, lambda: len(target.answers[R].tokens) > 3)
    lost = Tokens(deltas=(TokenDelta(R, 4, (1,)),))
    decode.core.on_unsent(GATEWAY, lost, target.now_ms)
    target.settle()
    assert target.answers[R].failed is None
    target.pass_time(400.0)
    while target.turn():
        pass
    failed = target.answers[R].failed
    assert failed is not None and failed.code == "peer_failed"
    assert decode.core.pool.available_pages == 400


def test_who_still_waits_when_the_drain_time_is_over_is_told() -> None:
    target = world()
    target.send("r", prompt(6), 300)
    target.send("young", prompt(150), 3)
    run_until(target, lambda: len(target.answers[R].tokens) > 3)
    told = [a.message.request for p in target.processes.values() for a in p.core.abandon()]
    assert R in told
