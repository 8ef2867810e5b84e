"""Laws of a prefill and a decode core together: right tokens, an answer for everybody, every page back."""

import random

import pytest

from common.ids import RequestId
from tests.support.fake_engine import answer
from tests.support.world import World


def prompt(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(3, 900) for _ in range(tokens)]


def assert_everything_is_back(world: World) -> None:
    for process in world.processes.values():
        if process.alive:
            process.core.check()
            assert process.core.pool.available_pages == process.ledger.total_pages


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("tokens", [1, 4, 5, 40])
def test_a_handed_over_request_gets_the_tokens_of_its_prompt(tokens: int, transport: str) -> None:
    world = World(random.Random(1), prefill_pages=60, decode_pages=60, transport=transport)
    world.greet()
    world.send("r", prompt(world.rng, tokens), 6)
    world.settle()
    seen = world.answers[RequestId("r")]
    assert (seen.finish, seen.tokens) == ("length", answer(seen.prompt, 6))
    assert_everything_is_back(world)


def test_a_request_for_one_token_ends_with_its_hand_over() -> None:
    world = World(random.Random(2), prefill_pages=60, decode_pages=60)
    world.greet()
    world.send("r", prompt(world.rng, 9), 1)
    world.settle()
    assert world.answers[RequestId("r")].tokens == answer(world.answers[RequestId("r")].prompt, 1)
    assert_everything_is_back(world)


def test_prompts_wait_for_decode_pages_and_all_are_answered() -> None:
    world = World(random.Random(3), prefill_pages=60, decode_pages=16)
    world.greet()
    for number in range(8):
        world.send(f"r{number}", prompt(world.rng, 12), 8)
    world.settle()
    assert all(a.tokens == answer(a.prompt, 8) for a in world.answers.values())
    assert_everything_is_back(world)


def test_a_request_too_large_for_the_decode_worker_is_refused_with_the_numbers() -> None:
    world = World(random.Random(4), prefill_pages=60, decode_pages=8)
    world.greet()
    world.send("r", prompt(world.rng, 12), 30)
    world.settle()
    failed = world.answers[RequestId("r")].failed
    assert failed is not None and failed.code == "out_of_pages" and "8" in failed.text
    assert_everything_is_back(world)


def test_a_request_whose_time_is_up_is_told_so_and_holds_nothing() -> None:
    world = World(random.Random(5), prefill_pages=60, decode_pages=300)
    world.greet()
    world.send("r", prompt(world.rng, 30), 400, timeout_ms=50)
    for _ in range(20):
        world.turn()
    world.pass_time(100.0)
    world.settle()
    failed = world.answers[RequestId("r")].failed
    assert failed is not None and failed.code == "deadline_exceeded"
    assert_everything_is_back(world)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("seed", range(24))
def test_after_any_mix_of_cancels_and_deaths_everybody_is_answered_and_no_page_is_lost(
    seed: int, transport: str
) -> None:
    rng = random.Random(seed)
    sizes = {"prefill_pages": rng.randrange(16, 60, 2), "decode_pages": rng.randrange(24, 60, 2)}
    world = World(rng, transport=transport, ahead=seed % 2 == 1, **sizes)
    world.greet()
    for number in range(14):
        world.send(f"r{number}", prompt(rng, rng.randrange(1, 20)), rng.randrange(1, 10))
        for _ in range(rng.randrange(40)):
            world.turn()
        chance = rng.random()
        if chance < 0.3:
            world.cancel(rng.choice(list(world.answers)))
        elif chance < 0.4:
            role = rng.choice(["prefill", "decode"])
            world.kill(role)
            world.start(role)
            world.greet()
        elif chance < 0.6:
            world.pass_time(rng.choice([1.0, 600.0, 2500.0]))
        elif chance < 0.8 and seed % 4 < 2:
            world.resize(rng.choice(["prefill", "decode"]), rng.randrange(16, 80))
    world.settle()
    for request, seen in world.answers.items():
        assert seen.done, request
        if seen.finish is not None and not seen.cancelled:
            assert seen.tokens == answer(seen.prompt, seen.max_tokens)
    assert_everything_is_back(world)
