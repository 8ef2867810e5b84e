"""Worlds of workers with six layers in which everything about memory is on: whatever happens, nothing is lost or left behind."""

import random
from dataclasses import dataclass

import pytest

from common.block_hash import hash_blocks
from common.ids import RequestId
from common.policy.elastic import ArenaTerms
from tests.support.fake_engine import answer
from tests.support.world import World
from tests.support.world_process import CHUNK_PAGES, LAYOUT

LAYERS, CONTEXT = 6, 100


@dataclass(frozen=True)
class Terms:
    """Scratch that grows with rows and keys."""

    def needs_bytes(self, rows: int, longest_keys: int) -> int:
        return 64 + rows * 64 + longest_keys * 8

    def rows_within(self, n_bytes: int, longest_keys: int) -> int:
        return max(0, n_bytes - self.needs_bytes(0, longest_keys)) // 64


def prompt(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(3, 900) for _ in range(tokens)]


def everything(rng: random.Random, **more: object) -> World:
    """A mixed worker, and one of each other kind, with all that they can do at once; pools of some 20 blocks."""
    max_step = rng.choice([16, 24, 64])
    arena = ArenaTerms(
        step=Terms(),
        chunk_bytes=CHUNK_PAGES * LAYOUT.page_bytes,
        chunk_pages=CHUNK_PAGES,
        max_rows=max_step,
        least_rows=5 + LAYOUT.block_tokens,
        max_keys=CONTEXT,
    )
    elastic = rng.choice(["kv", "full"])
    n_chunks = rng.choice([20, 24, 30]) * LAYERS // CHUNK_PAGES + arena.lasting_chunks(elastic) + 2 * LAYERS
    settings: dict[str, object] = {
        "layers": LAYERS,
        "prefill_pages": n_chunks * CHUNK_PAGES,
        "decode_pages": n_chunks * CHUNK_PAGES,
        "host_pages": rng.choice([60, 360, 2400]),
        "store_blocks": rng.choice([0, 30, 200]),
        "context_tokens": dict.fromkeys(("prefill", "decode", "mixed"), CONTEXT),
        "more": ("mixed",),
        "transport": rng.choice(["shm", "tcp"]),
        "flaky": rng.choice([0.0, 0.0, 0.2]),
        "ahead": rng.random() < 0.5,
        "arena": arena,
        "elastic": elastic,
        "layer_offload": rng.choice(["auto", 4, LAYERS]),
        "spare_memory": rng.choice(["keep", "release"]),
        "admission": rng.choice(["fcfs", "slo"]),
        "caching": rng.choice([0, 1, 2, 3]),
        "max_step_tokens": max_step,
        "spill": rng.choice(["write-through", "write-back"]),
        **more,
    }
    world = World(rng, **settings)  # type: ignore[arg-type]  # a test's keywords
    world.greet()
    return world


def require_end(world: World) -> None:
    """Right answers, and all memory where it was."""
    for name, seen in world.answers.items():
        assert seen.done, name
        if seen.failed is None and not seen.cancelled:
            assert seen.tokens == answer(seen.prompt, seen.max_tokens), name
    for name, process in world.processes.items():
        process.core.check()
        pool, counts = process.core.pool, process.core.pool.ledger.counts()
        assert pool.available_pages + counts.lent == counts.total, name
        assert process.core._scheduler.parking.buffer.used_pages == 0, name
        assert pool.cache.n_pinned == 0 and not process.rings, name


@pytest.mark.parametrize("seed", range(16))
def test_with_every_feature_on_all_work_ends_with_the_right_tokens_and_nothing_is_left(seed: int) -> None:
    rng = random.Random(seed)
    world = everything(rng)
    prefix = prompt(rng, 30)
    for number in range(rng.randrange(8, 20)):
        tokens = prompt(rng, rng.choice([1, 9, 20, 30, 60]))
        tokens = (prefix + tokens)[: CONTEXT - 30] if rng.random() < 0.4 else tokens
        to = rng.choice(["mixed", "mixed", "mixed", "prefill", "decode"])
        timeout_ms = rng.choice([10**7, 10**7, 60])
        world.send(f"r{number}", tokens, rng.choice([1, 2, 9, 25]), to=to, timeout_ms=timeout_ms)
        for _ in range(rng.randrange(0, 80)):
            world.turn()
        if rng.random() < 0.2:
            world.pass_time(rng.choice([1.0, 100.0, 900.0]))
        elif rng.random() < 0.1:
            world.cancel(RequestId(f"r{rng.randrange(number + 1)}"))
    world.settle()
    require_end(world)


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_a_prompt_that_was_found_elsewhere_waits_where_its_find_is_kept_fresh_until_all_of_its_layers_fit(
    transport: str,
) -> None:
    world = World(
        random.Random(0),
        layers=LAYERS,
        prefill_pages=180,
        decode_pages=180,
        transport=transport,
        store_blocks=400,
        layer_offload=LAYERS,
        host_pages=3000,
        max_step_tokens=400,
        more=("mixed",),
    )
    world.greet()
    core, rng = world.processes["mixed"].core, random.Random(1)
    shared = prompt(rng, 60)
    world.send("first", shared, 2, to="mixed")
    world.settle()
    for number in range(3):  # drives it out of the device's cache; the store keeps it
        world.send(f"wash{number}", prompt(rng, 100), 2, to="mixed")
        world.settle()
    assert core.pool.match(hash_blocks(tuple(shared[:-1]), core._root(""), 4)) == 0
    world.send("old", prompt(rng, 80), 40, to="mixed")
    while not world.answers["old"].tokens:
        world.turn()
    world.send("again", [*shared, *prompt(rng, 3)], 4, to="mixed", timeout_ms=200)
    for _ in range(12):
        world.turn()
    assert core._cache.take(RequestId("again")) is not None and "again" not in core._scheduler.sequences
    world.pass_time(300.0)
    assert world.processes["mixed"].core is core
    world.settle()
    assert world.answers["again"].failed is not None and core.idle
    require_end(world)


def test_a_prompt_that_is_handed_over_gets_no_block_for_tokens_it_does_not_draw() -> None:
    world = World(random.Random(0), prefill_pages=80, decode_pages=80, kv_layout="virtual", kvstore="off")
    world.greet()
    prefill = world.processes["prefill"]
    world.send("r", prompt(world.rng, 7), 30)
    while prefill.step is None:
        assert world.turn()
    assert prefill.core._scheduler.sequences[RequestId("r")].table.n_blocks == 2
    world.settle()
    require_end(world)


def test_a_sibling_does_not_wait_for_a_prompt_whose_layers_leave() -> None:
    """That one publishes nothing before all of its layers are back."""
    world = World(
        random.Random(0),
        layers=LAYERS,
        prefill_pages=180,
        decode_pages=180,
        layer_offload=LAYERS,
        host_pages=2000,
        max_step_tokens=400,
        kvstore="off",
        more=("mixed",),
    )
    world.greet()
    core, shared = world.processes["mixed"].core, prompt(world.rng, 56)
    scheduler = core._scheduler
    world.send("old", prompt(world.rng, 60), 30, to="mixed")
    while not world.answers["old"].tokens:
        world.turn()
    world.send("lead", [*shared, *prompt(world.rng, 4)], 3, to="mixed")
    while "lead" not in scheduler.sequences or scheduler.sequences[RequestId("lead")].ring is None:
        world.turn()
    world.send("sibling", [*shared, *prompt(world.rng, 3)], 3, to="mixed")
    world.settle()
    assert core._reporter._parts.shared.waits_total == 0
    require_end(world)
