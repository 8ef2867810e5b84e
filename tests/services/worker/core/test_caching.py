"""Laws of caching, over random orders of events: tokens never change, nothing stays held, everybody is answered."""

import random

import pytest

from common.ids import RequestId
from tests.support.fake_engine import answer
from tests.support.world import World

SPILLS = ("write-through", "write-back", "selective")


def check_end(world: World) -> None:
    """Tokens are right, every answer is there, and what is left is only cached: no pins, no pages of requests."""
    for name, seen in world.answers.items():
        assert seen.done, name
        if seen.failed is None and not seen.cancelled:
            assert seen.tokens == answer(seen.prompt, seen.max_tokens), name
    for process in world.processes.values():
        if process.alive:
            process.core.check()
            pool = process.core.pool
            assert pool.available_pages == pool.ledger.total_pages
            assert pool.cache.n_pinned == 0
    if world.store is not None:
        world.store.core.check()


def conversation(rng: random.Random, history: list[int], prefixes: list[list[int]]) -> list[int]:
    """The next prompt: a turn of what was said before, a known prefix with something new, or something else."""
    kind = rng.randrange(3)
    tail = [rng.randrange(3, 900) for _ in range(rng.randrange(1, 14))]
    if kind == 0 and history:
        return history + tail
    if kind == 1:
        return rng.choice(prefixes) + tail
    return tail


@pytest.mark.parametrize("seed", range(60))
def test_whatever_is_cached_where_the_tokens_are_those_of_the_prompt(seed: int) -> None:
    rng = random.Random(seed)
    world = World(
        rng,
        prefill_pages=rng.choice([28, 34, 120]),
        decode_pages=rng.choice([40, 60, 140]),
        transport=rng.choice(["shm", "tcp"]),
        store_blocks=rng.choice([0, 12, 200, 200]),
        flaky=rng.choice([0.0, 0.0, 0.2]),
        caching=rng.randrange(4),
        spill=rng.choice(SPILLS),
        eviction=rng.choice(["lru", "cost-aware"]),
        transfer=rng.choice(["layer", "request", "aggregated", "auto"]),
        ahead=seed % 2 == 1,
    )
    world.greet()
    prefixes = [[rng.randrange(3, 900) for _ in range(n)] for n in (4, 8, 17, 24, 30, 33)]
    history: list[int] = []
    for number in range(rng.randrange(6, 20)):
        prompt = conversation(rng, history, prefixes)[:44]
        world.send(f"r{number}", prompt, rng.randrange(1, 12))
        for _ in range(rng.randrange(0, 120)):
            world.turn()
        if rng.random() < 0.1:
            world.cancel(RequestId(f"r{rng.randrange(number + 1)}"))
        if rng.random() < 0.1:
            world.pass_time(rng.choice([100.0, 1_000.0, 6_000.0, 11_000.0]))
        if seed % 4 < 2 and rng.random() < 0.3:
            world.resize(rng.choice(["prefill", "decode"]), rng.randrange(20, 160))
        if rng.random() < 0.05 and world.store is not None:
            world.kill_store()
            if rng.random() < 0.5:
                world.start_store()
        if rng.random() < 0.04:
            role = rng.choice(["prefill", "decode"])
            world.kill(role)
            world.start(role)
            world.greet()
        if rng.random() < 0.5:
            world.settle()
            seen = world.answers[RequestId(f"r{number}")]
            history = seen.prompt + seen.tokens
    world.settle()
    world.pass_time(20_000.0)
    world.settle()
    check_end(world)


@pytest.mark.long
@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("spill", SPILLS)
@pytest.mark.parametrize("flaky", [0.0, 0.3])
def test_prefixes_that_outgrow_the_device_come_back_from_host_memory(flaky: float, spill: str, transport: str) -> None:
    """Six prefixes of eight blocks in turn, room for fourteen blocks: only the KV store can hold them all."""
    rng = random.Random(5)
    world = World(
        rng,
        prefill_pages=28,
        decode_pages=140,
        transport=transport,
        store_blocks=200,
        flaky=flaky,
        spill=spill,
        caching=1,
    )
    world.greet()
    prefixes = [[rng.randrange(3, 900) for _ in range(33)] for _ in range(6)]
    for number in range(60):
        world.send(f"r{number}", prefixes[number % 6] + [number + 3], 3)
        if number % 10 == 9:  # somebody else's prompt comes twice in a row: what selective spilling waits for
            world.send(f"again{number}", prefixes[number % 6] + [number + 4], 3)
        world.settle()
        world.pass_time(60.0)
        world.settle()
    check_end(world)
    counters = world.processes["prefill"].core.report(0, world.now_ms).counters
    assert counters["hit_tokens_total{tier=host}"] > 0
    assert (counters["load_failures_total"] > 0) == (flaky > 0 and transport == "shm")
    assert counters["evicted_blocks_total"] > 0


def test_a_lost_load_fails_the_request_if_the_operator_says_so() -> None:
    rng = random.Random(6)
    world = World(
        rng, prefill_pages=28, decode_pages=140, store_blocks=200, flaky=0.5, caching=1, on_load_failure="fail"
    )
    world.greet()
    prefixes = [[rng.randrange(3, 900) for _ in range(33)] for _ in range(4)]
    for number in range(40):
        world.send(f"r{number}", prefixes[number % 4] + [number + 3], 3)
        world.settle()
    check_end(world)
    codes = {seen.failed.code for seen in world.answers.values() if seen.failed is not None}
    assert codes == {"load_failed"}
    assert all(seen.failed.retryable for seen in world.answers.values() if seen.failed is not None)


@pytest.mark.parametrize(("caching", "reused"), [(0, 0), (1, 40), (2, 40), (3, 52)])
def test_a_second_turn_reuses_what_its_caching_level_keeps(caching: int, reused: int) -> None:
    """Prompt of 41 tokens, answer of 13, blocks of 4: level 3 knows all 53 computed tokens but the last block's part."""
    world = World(random.Random(7), prefill_pages=200, decode_pages=200, caching=caching)
    world.greet()
    first = [world.rng.randrange(3, 900) for _ in range(41)]
    world.send("one", first, 13)
    world.settle()
    said = world.answers[RequestId("one")].tokens
    world.send("two", [*first, *said, 7, 8, 9], 3)
    world.settle()
    check_end(world)
    assert world.answers[RequestId("two")].deltas[0].cached_tokens == reused


def test_level_two_sends_only_what_the_decode_worker_lacks() -> None:
    sent = {}
    for caching in (1, 2):
        world = World(random.Random(8), prefill_pages=200, decode_pages=200, caching=caching)
        world.greet()
        first = [world.rng.randrange(3, 900) for _ in range(40)]
        for name, tokens in (("one", first), ("two", [*first, 5, 6, 7])):
            world.send(name, tokens, 2)
            world.settle()
        check_end(world)
        counters = world.processes["prefill"].core.report(0, world.now_ms).counters
        sent[caching] = counters["kv_bytes_total{direction=prefill_to_decode}"]
    assert sent[2] == sent[1] * 11 / 21


def test_different_salts_never_share_a_block() -> None:
    world = World(random.Random(9), prefill_pages=200, decode_pages=200, store_blocks=100)
    world.greet()
    prompt = [world.rng.randrange(3, 900) for _ in range(40)]
    for name, salt in (("a1", "a"), ("b1", "b"), ("a2", "a")):
        world.send(name, prompt, 3, cache_salt=salt)
        world.settle()
    check_end(world)
    reused = {name: seen.deltas[0].cached_tokens for name, seen in world.answers.items()}
    assert reused == {"a1": 0, "b1": 0, "a2": 36}
