"""Every way a request can end on a worker: what is said, to whom, and that nothing stays behind."""

import random

from common.ids import Incarnation, RequestId, WorkerId
from common.messages.handover import GrantRequest
from common.messages.liveness import Member
from common.messages.requests import Sampling
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


def test_the_first_delta_alone_carries_cached_tokens_and_timings() -> None:
    target = world()
    target.send("r", prompt(6), 4)
    target.settle()
    with_extras = [(d.cached_tokens is not None, d.timings is not None) for d in target.answers[R].deltas]
    assert with_extras == [(True, True), (False, False), (False, False), (False, False)]


def test_cancelling_a_running_answer_frees_its_pages_before_it_would_have_ended() -> None:
    target = world()
    target.send("r", prompt(6), 300)
    run_until(target, lambda: len(target.answers[R].tokens) > 3)
    target.cancel(R)
    target.settle()
    assert len(target.answers[R].tokens) < 300
    assert target.processes["decode"].ledger.free_pages == 400


def test_cancelling_a_transfer_in_flight_quarantines_its_pages_until_the_writer_has_stopped() -> None:
    target = world()
    target.send("r", prompt(40), 5)
    decode = target.processes["decode"]
    run_until(target, lambda: decode.ledger.counts().granted > 0)
    target.perform(decode, decode.core._on_cancel(R, target.now_ms))  # before the prefill worker hears of it
    assert decode.ledger.counts().quarantined > 0 and decode.ledger.counts().granted == 0
    target.cancel(R)
    target.settle()
    assert decode.ledger.free_pages == 400


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
    assert all(p.ledger.free_pages == p.ledger.total_pages for p in target.processes.values())


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
    run_until(target, lambda: prefill.core.report(0).queue.waiting >= 2)
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
    target.perform(prefill, prefill.core.on_members([newer], target.now_ms))
    while target.turn():
        pass
    failed = target.answers[R].failed
    assert failed is not None and failed.retryable and "decode-0" in failed.text
    assert prefill.ledger.free_pages == 200


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
        assert process.core.report(1).draining
    target.send("late", prompt(6), 5)
    target.settle()
    assert target.answers[R].tokens == answer(prompt(6), 40)
    failed = target.answers[RequestId("late")].failed
    assert failed is not None and failed.retryable and "draining" in failed.text
