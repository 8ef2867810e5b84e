"""Laws of scratch that is lent by KV: what runs keeps what it needs, and whatever was admitted is computed."""

import random
from dataclasses import replace

import pytest

from common.errors import ConfigError, OutOfPages
from common.ids import Owner, RequestId
from common.policy.batching import Candidate, DecodeFirst
from common.policy.eviction import Lru
from kvstore.index.block_pool import BlockPool
from kvstore.index.ledger import Ledger, PageState
from services.worker.core.actions import LendChunks, TakeBackChunks
from services.worker.core.elastic import ACTIVATIONS, ElasticScratch
from services.worker.core.layer_rings import InOneStep
from services.worker.core.pool_memory import PoolMemory
from services.worker.core.prefix import Keep, PrefixReuse
from services.worker.core.scheduler import Scheduler
from tests.kvstore.index.chains import ROOT, straight
from tests.services.worker.core.arenas import CHUNK_BYTES, Orders, arena_terms, require_unharmed
from tests.services.worker.core.test_scheduler import ENGINE, run, submit
from tests.support.fake_engine import answer
from tests.support.world import World
from tests.support.world_process import CHUNK_PAGES, LAYOUT

A = Owner("a")
POLICY = DecodeFirst(64, 4)
TERMS = arena_terms()


def elastic(pages: int = 160, mode: str = "kv") -> tuple[ElasticScratch, BlockPool]:
    pool = BlockPool(Ledger(pages), LAYOUT.layers, Lru())
    return ElasticScratch(pool, TERMS, mode), pool


def scheduler(pages: int, mode: str = "kv") -> tuple[Scheduler, ElasticScratch, BlockPool]:
    scratch, pool = elastic(pages, mode)
    reuse = PrefixReuse(pool, Keep.NOTHING, LAYOUT.block_tokens, PoolMemory(scratch))
    return Scheduler(reuse, LAYOUT, POLICY, max_running=5, context_tokens=100), scratch, pool


def arena_of(scratch: ElasticScratch) -> list[int]:
    """What the memory of the arena is, from now on."""
    arena: list[int] = []

    def carry_out(order: LendChunks | TakeBackChunks) -> str:
        if isinstance(order, LendChunks):
            arena.extend(order.chunks)
        else:
            assert arena[-len(order.chunks) :] == list(order.chunks)
            del arena[-len(order.chunks) :]
        return ""

    scratch.carry_out_with(carry_out)
    return arena


def test_a_step_takes_what_it_needs_and_no_more() -> None:
    scratch, pool = elastic()
    arena = arena_of(scratch)
    assert scratch.n_chunks == TERMS.base_chunks == 4  # 64 + 9 * 256 + 100 * 8 bytes
    assert scratch.rows_allowed(40, 60) == 40
    assert scratch.n_chunks == TERMS.chunks_for(TERMS.step.needs_bytes(40, 60)) == 11
    assert pool.available_pages == 160 - 11 * CHUNK_PAGES
    before = scratch.n_chunks
    assert scratch.rows_allowed(20, 60) == 20
    assert scratch.n_chunks == before, "nothing moves for its own sake"
    assert sorted(arena) == sorted(pool.lent.of(ACTIVATIONS))
    pool.check()


def test_kv_that_anybody_holds_never_gives_way_and_the_step_is_cut_at_a_block() -> None:
    scratch, pool = elastic(pages=64)
    pool.alloc(A, 18, PageState.ACTIVE)
    counts = scratch.choose(POLICY, [Candidate(10, 11), Candidate(0, 60)])
    assert counts[0] == 1
    assert 0 < counts[1] < 60
    assert counts[1] % 4 == 0
    assert (scratch.cut_steps_total, len(pool.pages_of(A))) == (1, 36)
    whole = [Candidate(0, 60)]
    assert scratch.choose(InOneStep.of(whole), whole) == [0]
    assert scratch.cut_steps_total == 1, "a step that is called off is not a cut one"
    with pytest.raises(OutOfPages):
        pool.lent.lend(1, CHUNK_PAGES, ACTIVATIONS)
    pool.check()


def test_the_least_step_fits_however_full_the_pool_is() -> None:
    scratch, pool = elastic()
    while pool.available_pages >= LAYOUT.layers:
        pool.alloc(A, 1, PageState.ACTIVE)
    assert scratch.rows_allowed(64, 100) >= TERMS.least_rows
    assert scratch.n_chunks == TERMS.base_chunks


def test_short_kv_gets_back_what_no_step_in_flight_needs() -> None:
    scratch, pool = elastic()
    scratch.rows_allowed(64, 100)
    scratch.began()
    full = scratch.n_chunks
    assert not scratch.inflate(1), "the step in flight needs all of it"
    scratch.rows_allowed(20, 100)
    scratch.began()
    assert not scratch.inflate(1)
    scratch.ended()
    free = pool.available_pages
    assert scratch.inflate(9)
    assert pool.available_pages >= free + 9
    assert scratch.n_chunks == full - 3
    scratch.check()
    assert not scratch.inflate(1000), "nothing, rather than too little"
    assert scratch.n_chunks == full - 3
    scratch.ended()
    while scratch.inflate(1):
        scratch.check()
    assert scratch.n_chunks == TERMS.base_chunks
    pool.check()


@pytest.mark.parametrize(("layers", "chunk_pages"), [(2, 4), (6, 4), (32, 16), (5, 1)])
def test_pages_are_made_available_all_of_them_or_no_chunk_moves(layers: int, chunk_pages: int) -> None:
    for more in range(-2, 3):
        pool = BlockPool(Ledger(40 * layers + 40 * chunk_pages), layers, Lru())
        terms = replace(TERMS, chunk_pages=chunk_pages, least_rows=4)
        scratch = ElasticScratch(pool, terms, "kv")
        scratch.rows_allowed(32, 90)
        n_chunks, available, can_be_had = scratch.n_chunks, pool.available_pages, scratch.spare_pages
        assert scratch.inflate(can_be_had + more) == (more <= 0)
        assert (scratch.n_chunks == n_chunks) == (more > 0)
        assert pool.available_pages >= available + (can_be_had + more if more <= 0 else 0)
        scratch.check()
        pool.check()


def test_a_step_that_is_whole_or_not_at_all_takes_nothing_if_it_is_not() -> None:
    scratch, pool = elastic(pages=120)
    names = straight(10)
    pool.publish(A, names, pool.alloc(A, 10, PageState.ACTIVE), parent=ROOT, depth=0)
    pool.release(A)
    pool.alloc(A, 35, PageState.ACTIVE)
    candidates = [Candidate(0, 90)]
    assert scratch.choose(InOneStep.of(candidates), candidates) == [0]
    assert (pool.match(names), scratch.n_chunks, scratch.cut_steps_total) == (10, TERMS.base_chunks, 0)


def test_a_prompt_longer_than_any_other_step_is_left_out_where_there_is_too_little() -> None:
    pool = BlockPool(Ledger(160), LAYOUT.layers, Lru())
    scratch = ElasticScratch(pool, arena_terms(max_rows=3), "kv")  # the least step has nine
    while pool.available_pages >= LAYOUT.layers:
        pool.alloc(A, 1, PageState.ACTIVE)
    candidates = [Candidate(0, 60)]
    assert scratch.choose(InOneStep.of(candidates), candidates) == [0]


def test_static_lends_for_the_one_step_of_a_longer_prompt_and_has_it_back() -> None:
    scratch, _ = elastic(mode="static")
    candidates = [Candidate(0, 80)]
    assert scratch.choose(InOneStep.of(candidates), candidates) == [80]
    scratch.began()
    more = scratch.n_chunks - TERMS.full_chunks
    assert more > 0 and not scratch.inflate(1)
    scratch.ended()
    assert scratch.inflate(more * CHUNK_PAGES) and scratch.n_chunks == TERMS.full_chunks


def test_what_comes_back_is_the_arena_s_end() -> None:
    scratch, _ = elastic()
    arena = arena_of(scratch)
    scratch.rows_allowed(40, 100)
    assert scratch.inflate(4)
    scratch.rows_allowed(60, 100)
    assert arena == scratch._chunks
    assert scratch.inflate(5)
    assert arena == scratch._chunks


def test_static_keeps_the_largest_step_s_scratch_and_lends_none() -> None:
    scratch, pool = elastic(mode="static")
    available = pool.available_pages
    assert scratch.n_chunks == TERMS.full_chunks
    assert scratch.rows_allowed(64, 100) == 64
    assert not scratch.inflate(1)
    assert pool.available_pages == available == pool.usable_pages


def test_no_room_for_kv_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        ConfigError,
        match=r"--elastic=static keeps 17.0 KiB for steps of 64 rows and 100 keys \(800 B of it to gather keys\).*give .* more",
    ):
        elastic(pages=68, mode="static")
    elastic(pages=80, mode="static")
    elastic(pages=68, mode="kv")


def test_two_prompts_that_half_fit_are_both_computed() -> None:
    target, scratch, pool = scheduler(pages=68)
    for name in ("a", "b"):
        submit(target, name, 40, max_tokens=30)
    finished: dict[str, list[int]] = {}
    run(target, finished)
    assert finished == {name: answer(list(range(1, 41)), 30) for name in ("a", "b")}
    assert target.preemptions_total
    scratch.check()
    pool.check()


@pytest.mark.parametrize("mode", ["static", "kv"])
@pytest.mark.parametrize("seed", range(6))
def test_all_that_is_admitted_ends_in_any_tiny_pool(seed: int, mode: str) -> None:
    rng = random.Random(seed)
    target, scratch, pool = scheduler(rng.randrange(90, 160), mode)
    finished: dict[str, list[int]] = {}
    longest = min(96, pool.usable_pages // LAYOUT.layers * LAYOUT.block_tokens)
    for number in range(25):
        prompt = rng.randrange(1, longest)
        submit(target, f"r{number}", prompt, max_tokens=rng.randrange(1, longest - prompt + 1))
        if rng.random() < 0.5:
            continue
        plan = target.plan()
        assert plan is not None
        for new in target.complete(ENGINE.step(plan, None)):
            if new.sequence.generated_tokens == new.sequence.sampling.max_tokens:
                finished[new.sequence.request] = new.sequence.tokens[new.sequence.prompt_tokens :]
                target.drop(new.sequence.request)
        scratch.check()
        pool.check()
    run(target, finished)
    assert len(finished) == 25
    assert pool.ledger.counts().lent == pool.ledger.total_pages - pool.ledger.free_pages
    scratch.check()


@pytest.mark.parametrize("elastic_mode", ["static", "kv", "full"])
@pytest.mark.parametrize("ahead", [False, True])
def test_answers_are_right_while_memory_goes_to_and_fro(elastic_mode: str, *, ahead: bool) -> None:
    """Pages that are lent must not be touched, and every step has its scratch: the world checks both."""
    returned = 0
    for seed in range(2):
        rng = random.Random(seed)
        world = World(
            rng,
            prefill_pages=84,
            decode_pages=84,
            arena=arena_terms(max_rows=32),
            elastic=elastic_mode,
            ahead=ahead,
            max_step_tokens=32,
        )
        world.greet()
        for number in range(14):
            prompt = [rng.randrange(2, 5)] * rng.choice([3, 9, 30, 60]) + [number]
            world.send(f"r{number}", prompt, rng.randrange(1, 12))
            for _ in range(rng.randrange(20)):
                world.turn()
        require_unharmed(world)
        returned += world.chunks.moved["returned"]
    assert (returned > 0) == (elastic_mode != "static")


@pytest.mark.parametrize("to", ["prefill", "decode"])
def test_a_prompt_that_fits_only_without_the_arena_is_refused(to: str) -> None:
    world = World(random.Random(0), prefill_pages=48, decode_pages=48, arena=arena_terms(max_rows=32), elastic="kv")
    world.greet()
    world.send("long", [2] * 66, 2, to=to)  # 34 pages; the arena keeps 16 of 48
    world.send("short", [2] * 50, 2, to=to)
    world.settle()
    failed = world.answers[RequestId("long")].failed
    assert failed is not None
    assert "32 in all" in failed.text
    assert world.answers[RequestId("short")].failed is None


def test_a_limit_cuts_the_step_at_a_block() -> None:
    candidates = [Candidate(10, 11), Candidate(8, 60), Candidate(0, 3)]
    assert POLICY.choose(candidates) == [1, 52, 3]
    assert POLICY.choose(candidates, 20) == [1, 16, 3]
    assert POLICY.choose(candidates, 1) == [1, 0, 0]


def test_off_orders_nothing() -> None:
    world = World(random.Random(0), prefill_pages=80, decode_pages=80)
    world.greet()
    world.send("r", [2] * 30, 5)
    world.settle()
    assert world.chunks.moved["lent"] == 0


def test_a_pool_of_which_chunks_are_lent_is_not_resized_and_says_so() -> None:
    world = World(random.Random(0), prefill_pages=120, decode_pages=120, arena=arena_terms(max_rows=32), elastic="kv")
    world.greet()
    world.resize("decode", 80)
    world.settle()
    assert "chunks of decode-0's memory are lent" in world.resized[0].problem
    assert world.processes["decode"].core.pool.ledger.total_pages == 120


def test_what_lasts_cannot_be_had_for_kv_and_the_rest_of_the_arena_can() -> None:
    scratch, pool = elastic()
    assert (pool.ledger.counts().lent > 0, pool.lent.recallable_pages) == (True, 0)
    least_pages = pool.ledger.counts().lent
    scratch.rows_allowed(64, 100)
    assert pool.lent.recallable_pages == pool.ledger.counts().lent - least_pages > 0


def test_orders_name_whole_chunks_that_the_pool_lent() -> None:
    scratch, pool = elastic()
    orders = Orders()
    scratch.carry_out_with(orders)
    scratch.rows_allowed(64, 100)
    scratch.inflate(8)
    assert [type(order) for order in orders.take()] == [LendChunks, LendChunks, TakeBackChunks]
    assert pool.ledger.counts().lent * LAYOUT.page_bytes == scratch.n_chunks * CHUNK_BYTES


def refusing(scratch: ElasticScratch) -> Orders:
    orders = Orders()
    scratch.carry_out_with(orders)
    orders.take()
    orders.problem = "no mapping left"
    return orders


def test_a_step_whose_scratch_cannot_be_mapped_is_cut_to_what_the_arena_has_and_nothing_is_lent() -> None:
    scratch, pool = elastic()
    orders, available = refusing(scratch), pool.available_pages
    counts = scratch.choose(POLICY, [Candidate(10, 11), Candidate(0, 60)])
    assert counts[0] == 1 and 0 < counts[1] < 60
    assert (scratch.n_chunks, scratch.refused_chunks_total) == (TERMS.base_chunks, 12)
    assert (pool.available_pages, scratch.cut_steps_total) == (available, 1)
    scratch.began()
    scratch.check()
    pool.check()
    assert len(orders.take()) == 1


def test_after_a_refusal_some_steps_ask_for_nothing_and_then_one_does() -> None:
    scratch, _ = elastic()
    orders = refusing(scratch)
    asked = []
    for _ in range(40):
        scratch.choose(POLICY, [Candidate(0, 60)])
        scratch.began()
        scratch.ended()
        asked.append(len(orders.take()))
    assert asked == [1 if step % 16 == 0 else 0 for step in range(40)]
    orders.problem = ""
    while scratch.n_chunks == TERMS.base_chunks:
        counts = scratch.choose(POLICY, [Candidate(0, 60)])
        scratch.began()
        scratch.ended()
    assert counts == [60]


def test_what_cannot_be_mapped_at_home_stays_the_arena_s_end_and_kv_does_without() -> None:
    scratch, pool = elastic()
    scratch.rows_allowed(64, 100)
    orders, chunks, available = refusing(scratch), list(scratch._chunks), pool.available_pages
    assert not scratch.inflate(9)
    assert (scratch._chunks, pool.available_pages) == (chunks, available)
    scratch.check()
    orders.problem = ""
    for _ in range(16):
        assert not scratch.inflate(9)
        scratch.choose(POLICY, [])
    assert scratch.inflate(9)
    assert scratch.refused_chunks_total == 3
    pool.check()


@pytest.mark.parametrize("ahead", [False, True])
def test_after_a_refusal_some_plans_take_nothing_back_and_then_one_does(ahead: bool) -> None:
    scratch, _ = elastic()
    scratch.rows_allowed(64, 100)
    orders, asked = refusing(scratch), []
    for _ in range(40):
        for _ in range(3):  # as often as somebody lacks pages
            scratch.inflate(9)
        scratch.choose(POLICY, [Candidate(0, 9)])
        scratch.began()
        if not ahead or len(scratch._needed_bytes) == 2:
            scratch.ended()
        asked.append(len(orders.take()))
    assert asked == [1 if step % 16 == 0 else 0 for step in range(40)]


def test_the_pause_after_a_refusal_ends_though_nothing_can_be_computed_meanwhile() -> None:
    scratch, _ = elastic()
    orders, candidates = refusing(scratch), [Candidate(0, 60)]
    assert scratch.choose(InOneStep.of(candidates), candidates) == [0]
    orders.problem = ""
    for _ in range(15):
        assert scratch.choose(InOneStep.of(candidates), candidates) == [0]
    assert scratch.choose(InOneStep.of(candidates), candidates) == [60]
    assert len(orders.take()) == 2


def test_an_arena_that_cannot_be_mapped_at_all_is_refused() -> None:
    scratch, orders = elastic()[0], Orders()
    orders.problem = "no mapping left"
    with pytest.raises(ConfigError, match="the 4 chunks that steps always keep: no mapping left"):
        scratch.carry_out_with(orders)


@pytest.mark.parametrize("ahead", [False, True])
def test_answers_are_right_and_all_pages_come_back_while_mappings_fail(ahead: bool) -> None:
    refused = 0
    for seed in range(3):
        rng = random.Random(seed)
        more = {"spare_memory": "release", "elastic": "kv", "max_step_tokens": 32, "kvstore": "off"}
        arena = arena_terms(max_rows=32)
        world = World(rng, prefill_pages=100, decode_pages=100, arena=arena, flaky_maps=0.5, ahead=ahead, **more)
        world.greet()
        for number in range(20):
            prompt = [rng.randrange(2, 5)] * rng.choice([9, 30, 60]) + [number]
            world.send(f"r{number}", prompt, rng.randrange(1, 20))
            for _ in range(rng.randrange(20)):
                world.turn()
        require_unharmed(world)
        refused += world.chunks.moved["refused"]
    assert refused > 0
