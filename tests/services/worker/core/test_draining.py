"""Draining, by an operator's word and by SIGTERM; and who goes first."""

import random

import pytest

from common.errors import ProtocolViolation
from common.ids import PeerId, RequestId
from common.messages.actions import Send
from common.messages.blocks import Find, Release
from common.messages.handover import GrantRefused, GrantRequest
from common.messages.liveness import Drain, Report
from common.messages.requests import FetchHint, Sampling
from common.messages.resizing import Resize
from tests.services.worker.core.test_caching import check_end
from tests.support.fake_engine import answer
from tests.support.world import GATEWAY, World
from tests.support.world_process import Process

PROMPT = [(at * 11) % 900 + 3 for at in range(41)]


def world(**more: object) -> World:
    made = World(random.Random(2), **{"prefill_pages": 200, "decode_pages": 200, "more": ("prefill-1",), **more})  # type: ignore[arg-type]  # a test's keywords
    made.greet()
    return made


def drain(target: World, name: str, *, on: bool = True) -> Process:
    process = target.processes[name]
    target.post(GATEWAY, process.peer, Drain(on=on))
    while any(isinstance(message, Drain) for message, _ in target.links.get((GATEWAY, process.peer), ())):
        target.turn()
    return process


def report(target: World, process: Process) -> Report:
    return process.core.report(0, target.now_ms)


@pytest.mark.parametrize("to", ["prefill", "decode"])
def test_a_worker_told_to_drain_refuses_what_is_new_until_it_is_told_otherwise(to: str) -> None:
    target = world()
    process = drain(target, to)
    assert report(target, process).draining
    target.send("r", PROMPT, 3, to=to)
    target.settle()
    failed = target.answers[RequestId("r")].failed
    assert failed is not None and (failed.code, failed.retryable) == ("no_worker", True)
    drain(target, to, on=False)
    assert not report(target, process).draining
    target.send("again", PROMPT, 3, to=to)
    target.settle()
    check_end(target)
    assert target.answers[RequestId("again")].finish == "length"


def test_nobody_but_a_gateway_can_tell_a_worker_to_drain() -> None:
    target = world()
    prefill, decode = target.processes["prefill"], target.processes["decode"]
    with pytest.raises(ProtocolViolation):
        decode.core.on_message(prefill.peer, Drain(on=True), target.now_ms)
    assert not report(target, decode).draining


def test_the_word_to_serve_again_does_not_call_off_an_end() -> None:
    target = world()
    process = drain(target, "decode")
    process.core.drain()
    drain(target, "decode", on=False)
    assert report(target, process).draining


def test_prompts_on_their_way_to_a_decode_worker_that_was_told_to_drain_are_served() -> None:
    target = world(decode_pages=24)
    for number in range(8):
        target.send(f"r{number}", PROMPT[:12], 6)
    while not target.processes["prefill"].core._queue:
        target.turn()
    drain(target, "decode")
    target.settle()
    check_end(target)
    assert all(seen.finish == "length" for seen in target.answers.values())


def test_a_prefill_worker_that_drains_finishes_its_queue() -> None:
    target = world(decode_pages=24)
    for number in range(8):
        target.send(f"r{number}", PROMPT[:12], 6)
    while not target.processes["prefill"].core._queue:
        target.turn()
    arrived = len(target.processes["prefill"].core._prompts)
    while len(target.processes["prefill"].core._prompts) + sum(a.done for a in target.answers.values()) < 8:
        target.turn()
    target.processes["prefill"].core.drain()
    target.settle()
    check_end(target)
    assert arrived and all(seen.finish == "length" for seen in target.answers.values())


def test_a_decode_worker_that_ends_serves_the_grants_it_was_asked_for_and_sends_the_others_elsewhere_at_once() -> None:
    """What waits at prefill workers is told at once that it may be tried again; time does not pass."""
    target = world(decode_pages=24)
    for number in range(8):
        target.send(f"r{number}", PROMPT[:12], 6)
    prefill = target.processes["prefill"].core
    while len(prefill._prompts) < 8:
        assert target.turn()
    asked = {p.message.request for p in prefill._prompts.values() if p.transfer is not None}
    link = target.processes["prefill"].peer, target.processes["decode"].peer
    while any(isinstance(message, GrantRequest) for message, _ in target.links.get(link, ())):
        target.turn()
    target.processes["decode"].core.drain()
    while target.turn():
        pass
    check_end(target)
    for request, seen in target.answers.items():
        if request in asked:
            assert seen.finish == "length"
        elif seen.failed is not None:
            assert (seen.failed.code, seen.failed.retryable) == ("no_worker", True)
    assert any(seen.failed is not None for seen in target.answers.values())


def test_a_repeated_request_for_pages_is_no_new_one_to_a_decode_worker_that_ends() -> None:
    target = world()
    decode, prefill = target.processes["decode"], target.processes["prefill"]
    target.send("r", PROMPT, 3)
    link = prefill.peer, decode.peer
    while not any(isinstance(message, GrantRequest) for message, _ in target.links.get(link, ())):
        target.turn()
    request = next(message for message, _ in target.links[link] if isinstance(message, GrantRequest))
    while any(message is request for message, _ in target.links[link]):
        target.turn()
    decode.core.drain()
    said = decode.core.on_message(prefill.peer, request, target.now_ms)
    assert not [a for a in said if isinstance(a, Send) and isinstance(a.message, GrantRefused)]
    target.settle()
    assert target.answers[RequestId("r")].tokens == answer(PROMPT, 3)


def test_prompts_for_a_decode_worker_that_is_gone_fail_wherever_they_stand_in_the_queue() -> None:
    """The first of the queue waits for room, and must not hide that the others will never be taken."""
    target = world(prefill_pages=28, more=("decode-1",))
    prefill = target.processes["prefill"]
    target.send("long", PROMPT, 400, timeout_ms=10**6)
    target.send("first", PROMPT, 3)
    prefill.core._queue._preparation.has_room = lambda prompt: False
    message = target.generate("r", PROMPT, Sampling(max_tokens=3), decode="decode-1")
    target.post(GATEWAY, prefill.peer, message)
    while target.turn():
        pass
    gone = target.processes["decode-1"]
    gone.alive = False
    target.bury(gone.peer)
    target.pass_time(2_001.0)
    while target.turn():
        pass
    failed = target.answers[RequestId("r")].failed
    assert failed is not None and (failed.code, failed.retryable) == ("no_worker", True)


@pytest.mark.parametrize("by_word", [True, False])
def test_a_draining_worker_lends_what_it_has_and_is_not_idle_before_it_is_given_back(by_word: bool) -> None:
    target = world(caching=2)
    target.send("theirs", PROMPT, 1, to="prefill-1")
    target.settle()
    holder = target.processes["prefill-1"]
    if by_word:
        drain(target, "prefill-1")
    else:
        holder.core.drain()
    target.send("r", PROMPT, 1, fetch=FetchHint(holder=holder.peer, n_blocks=10))
    while report(target, holder).gauges["leases"] == 0:
        assert target.turn()
    assert not holder.core.idle
    target.settle()
    assert target.answers[RequestId("r")].deltas[0].cached_tokens == 40
    assert holder.core.idle and report(target, holder).gauges["leases"] == 0


def test_a_lease_that_nobody_gives_back_ends_by_itself() -> None:
    target = world(caching=2)
    target.send("theirs", PROMPT, 1, to="prefill-1")
    target.settle()
    holder = target.processes["prefill-1"]
    names = tuple(block.name for block in holder.core.pool.cache)
    holder.core.on_message(PeerId("x@1"), Find(call=1, blocks=names[:1], lease_ms=10**9), target.now_ms)
    assert not holder.core.idle
    target.pass_time(10_001.0)
    assert holder.core.idle
    holder.core.on_message(PeerId("x@1"), Release(call=1), target.now_ms)


def test_a_lent_block_that_its_reader_found_wrong_is_kept_no_longer() -> None:
    target = world(caching=2)
    target.send("theirs", PROMPT, 1, to="prefill-1")
    target.settle()
    holder, reader = target.processes["prefill-1"], PeerId("x@1")
    name = next(block.name for block in holder.core.pool.cache)
    holder.core.on_message(reader, Find(call=1, blocks=(name,), lease_ms=1000), target.now_ms)
    holder.core.on_message(reader, Release(call=1, corrupt=(name,)), target.now_ms)
    assert name not in holder.core.pool.cache
    holder.core.check()


@pytest.mark.parametrize("to", ["prefill", "decode"])
def test_prompts_that_wait_go_by_priority_and_equals_by_arrival(to: str) -> None:
    target = world()
    process = target.processes[to]
    preparation = process.core._queue._preparation if to == "prefill" else process.core._local._preparation
    preparation.has_room = lambda prompt: False
    priorities = {"a": 0, "b": 5, "c": -1, "d": 0, "e": 5, "f": -1}
    for name, priority in priorities.items():
        target.send(name, PROMPT, 2, to=to, priority=priority)
        while target.turn():
            pass
    waiting = process.core._queue if to == "prefill" else process.core._local._waiting.values()
    assert [one.message.request for one in waiting] == ["c", "f", "a", "d", "b", "e"]
    del preparation.has_room
    target.settle()
    check_end(target)


def test_workers_that_dial_each_other_hear_both_connections() -> None:
    """Pings of one are no answer to the other's, but both are signs of life; a silent one is forgotten on both."""
    target = world()
    one, other = target.processes["prefill"], target.processes["prefill-1"]
    for _ in range(12):
        target.pass_time(400.0)
        while target.turn():
            pass
    assert one.core._callers.knows(other.peer) and one.core._neighbours.link(other.peer) is not None
    other.alive = False
    for _ in range(9):
        target.pass_time(400.0)
        while target.turn():
            pass
    assert not one.core._callers.knows(other.peer) and one.core._neighbours.link(other.peer) is None


def test_a_stranger_gives_no_orders_and_a_gateway_that_was_silent_still_does() -> None:
    target = world()
    decode = target.processes["decode"]
    for order in (Drain(on=True), Resize(call=1, device_memory_bytes=2**40)):
        with pytest.raises(ProtocolViolation):
            decode.core.on_message(PeerId("stranger@1"), order, target.now_ms)
    later_ms = target.now_ms + 60_000.0
    decode.core.on_tick(later_ms)
    decode.core.on_message(GATEWAY, Drain(on=True), later_ms)
    assert report(target, decode).draining
