"""Prompts that a worker computes and answers itself: queue, lookup, endings."""

import random

from common.ids import RequestId
from common.messages.actions import Send
from common.messages.requests import Failed, Generate, Sampling
from tests.support.fake_engine import answer
from tests.support.world import GATEWAY, World

R = RequestId("r")


def world(*, pages: int = 60, **settings: object) -> World:
    made = World(random.Random(3), prefill_pages=60, decode_pages=pages, **settings)
    made.greet()
    return made


def ask(target: World, name: str, prompt: list[int], max_tokens: int, *, timeout_ms: int = 10**6) -> None:
    """Straight to the decode worker: what a mixed worker is asked all the time."""
    whole = target.generate(name, prompt, Sampling(max_tokens=max_tokens), timeout_ms=timeout_ms)
    local = Generate(request=whole.request, prompt=whole.prompt, sampling=whole.sampling, timeout_ms=timeout_ms)
    target.post(GATEWAY, target.processes["decode"].peer, local)


def prompt(first: int, tokens: int) -> list[int]:
    return [(first * 37 + at * 11) % 900 + 3 for at in range(tokens)]


def test_more_prompts_than_fit_are_all_answered_in_turn() -> None:
    target = world()
    for number in range(12):
        ask(target, f"r{number}", prompt(number, 20), 6)
    target.settle()
    assert all(seen.tokens == answer(seen.prompt, 6) for seen in target.answers.values())
    target.processes["decode"].core.check()


def test_what_the_device_cannot_hold_comes_back_from_host_memory() -> None:
    target = world(pages=28, store_blocks=200, spill="write-back")
    for number in range(24):
        ask(target, f"r{number}", prompt(number % 4, 33), 3)
        target.settle()
        target.pass_time(60.0)
    target.settle()
    assert all(seen.tokens == answer(seen.prompt, 3) for seen in target.answers.values())
    counters = target.processes["decode"].core.report(0, target.now_ms).counters
    assert counters["hit_tokens_total{tier=host}"] > 0
    reused = sum(seen.deltas[0].cached_tokens for seen in target.answers.values())
    assert reused == sum(value for key, value in counters.items() if key.startswith("hit_tokens_total"))


def test_the_time_in_the_queue_is_told_apart_from_the_time_of_computing() -> None:
    target = world(pages=28)
    ask(target, "long", prompt(1, 40), 12)
    ask(target, "r", prompt(2, 40), 2)
    target.carry((GATEWAY, target.processes["decode"].peer))
    target.carry((GATEWAY, target.processes["decode"].peer))
    target.pass_time(400.0)
    target.settle()
    long, short = (target.answers[RequestId(name)].deltas[0].timings for name in ("long", "r"))
    assert long.prefill_queue_ms == 0.0 and long.compute_ms >= 400.0
    assert short.prefill_queue_ms >= 400.0 > short.compute_ms > 0.0


def test_a_prompt_out_of_time_before_it_starts_says_so() -> None:
    target = world(pages=28)
    ask(target, "long", prompt(1, 40), 12)
    ask(target, "r", prompt(2, 40), 2, timeout_ms=300)
    target.carry((GATEWAY, target.processes["decode"].peer))
    target.carry((GATEWAY, target.processes["decode"].peer))
    target.pass_time(400.0)
    target.settle()
    failed = target.answers[R].failed
    assert failed is not None and (failed.code, failed.phase) == ("deadline_exceeded", "prefill_queue")
    assert target.answers[RequestId("long")].finish == "length"


def test_a_worker_that_ends_tells_every_prompt_that_waits() -> None:
    target = world(pages=28)
    ask(target, "long", prompt(1, 40), 12)
    ask(target, "r", prompt(2, 40), 2)
    decode = target.processes["decode"]
    target.carry((GATEWAY, decode.peer))
    target.carry((GATEWAY, decode.peer))
    told = [
        action.message.request
        for action in decode.core.abandon()
        if isinstance(action, Send) and isinstance(action.message, Failed)
    ]
    assert sorted(told) == ["long", "r"]


def test_a_silent_gateway_leaves_no_prompt_behind() -> None:
    target = world(pages=28)
    ask(target, "long", prompt(1, 40), 12)
    ask(target, "r", prompt(2, 40), 2)
    decode = target.processes["decode"]
    target.carry((GATEWAY, decode.peer))
    target.carry((GATEWAY, decode.peer))
    target.perform(decode, decode.core.on_tick(target.now_ms + 60_000.0))
    target.settle()
    assert target.answers[R].failed is not None
    assert decode.core.pool.available_pages == decode.ledger.total_pages
