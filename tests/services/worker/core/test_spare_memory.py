"""Laws of page memory that the system has for a while: only what is free goes, and it is back before it is used."""

import random

import pytest

from common.ids import Owner, RequestId
from common.messages.requests import Sampling
from common.policy.eviction import Lru
from common.policy.spare import SpareMarks, SpareRule
from kvstore.index.block_pool import BlockPool
from kvstore.index.ledger import Ledger, PageState
from services.worker.core.actions import LendChunks, TakeBackChunks
from services.worker.core.elastic import ElasticScratch, OwnScratch
from services.worker.core.pool_memory import PoolMemory
from services.worker.core.sequence import NewPrompt
from services.worker.core.spare_memory import SYSTEM, SpareMemory
from tests.kvstore.index.chains import ROOT, straight
from tests.services.worker.core.arenas import Orders, arena_terms, require_unharmed
from tests.support.world import World
from tests.support.world_process import CHUNK_PAGES

A = Owner("a")


def idle() -> tuple[SpareMemory, BlockPool, Orders]:
    """Twenty chunks, of which the system gets half when the second tick comes."""
    pool = BlockPool(Ledger(20 * CHUNK_PAGES), 2, Lru())
    rule = SpareRule(SpareMarks(low_chunks=3, high_chunks=6, hold_ms=100.0))
    spare, orders = SpareMemory(pool, rule, CHUNK_PAGES), Orders()
    spare.carry_out_with(orders)
    for now_ms in (0.0, 100.0):
        spare.on_tick(now_ms, may_lend=True)
    return spare, pool, orders


def test_free_chunks_go_and_their_pages_are_not_available() -> None:
    _, pool, orders = idle()
    (order,) = orders.take()
    assert isinstance(order, LendChunks)
    assert (order.to, len(order.chunks)) == (SYSTEM, 10)
    assert pool.available_pages == 10 * CHUNK_PAGES
    assert pool.usable_pages == 20 * CHUNK_PAGES, "it can be had"
    assert pool.lent.recallable_pages == 10 * CHUNK_PAGES
    pool.check()


def test_nothing_goes_while_the_pool_changes_its_size() -> None:
    pool = BlockPool(Ledger(20 * CHUNK_PAGES), 2, Lru())
    spare = SpareMemory(pool, SpareRule(SpareMarks(low_chunks=1, high_chunks=2, hold_ms=0.0)), CHUNK_PAGES)
    spare.on_tick(0.0, may_lend=False)
    assert spare.away_chunks == 0


def test_no_cached_block_goes_for_the_system() -> None:
    pool, names = BlockPool(Ledger(20 * CHUNK_PAGES), 2, Lru()), straight(28)
    pages = pool.alloc(A, 28, PageState.ACTIVE)
    pool.publish(A, names, pages, parent=ROOT, depth=0)
    pool.release(A)
    spare = SpareMemory(pool, SpareRule(SpareMarks(low_chunks=1, high_chunks=2, hold_ms=0.0)), CHUNK_PAGES)
    for now_ms in range(20):
        spare.on_tick(float(now_ms), may_lend=True)
        if now_ms == 5:
            spare.recall(3 * CHUNK_PAGES)
    assert spare.away_chunks > 3
    assert pool.match(names) == 28


def test_pages_are_available_when_their_memory_is_there_and_not_before() -> None:
    spare, pool, orders = idle()
    orders.take()
    assert not PoolMemory(OwnScratch(), spare).inflate(6)
    (order,) = orders.take()
    assert order == TakeBackChunks(tuple(pool.lent.of(SYSTEM)[:2]), SYSTEM)
    assert pool.available_pages == 10 * CHUNK_PAGES
    spare.recall(6)
    assert orders.take() == [], "they are coming"
    spare.on_chunks_back(order.chunks, "")
    assert pool.available_pages == 12 * CHUNK_PAGES
    pool.check()


def test_what_the_system_does_not_give_is_asked_for_again_at_a_later_tick_and_not_before() -> None:
    spare, pool, orders = idle()
    orders.take()
    spare.recall(4)
    (order,) = orders.take()
    spare.on_chunks_back(order.chunks, "no memory left")
    assert (spare.away_chunks, spare.refused_chunks_total) == (10, 1)
    spare.recall(4)
    assert orders.take() == []
    spare.on_tick(200.0, may_lend=True)
    spare.recall(4)
    assert orders.take() == [order]
    pool.check()


def test_what_would_not_suffice_stays_with_the_system() -> None:
    spare, _, orders = idle()
    orders.take()
    spare.recall(10 * CHUNK_PAGES + 1)
    assert orders.take() == []
    spare.recall(10 * CHUNK_PAGES)
    assert len(orders.take()) == 1


def test_nothing_goes_while_somebody_lacks_pages() -> None:
    spare, _, orders = idle()
    orders.take()
    for now_ms in (300.0, 500.0):
        spare.recall(10**6)
        spare.on_tick(now_ms, may_lend=True)
        assert orders.take() == []
    spare.on_tick(700.0, may_lend=True)
    assert len(orders.take()) == 1


def test_what_is_asked_for_comes_in_portions_one_after_the_other() -> None:
    pool = BlockPool(Ledger(20 * CHUNK_PAGES), 2, Lru())
    rule = SpareRule(SpareMarks(low_chunks=3, high_chunks=6, hold_ms=0.0))
    spare, orders = SpareMemory(pool, rule, CHUNK_PAGES, portion_chunks=4), Orders()
    spare.carry_out_with(orders)
    for now_ms in range(3):
        spare.on_tick(float(now_ms), may_lend=True)
    assert [len(order.chunks) for order in orders.take()] == [4, 4, 4]
    spare.recall(9 * CHUNK_PAGES)
    portions = []
    while taken := orders.take():
        (order,) = taken
        portions.append(len(order.chunks))
        spare.on_chunks_back(order.chunks, "")
    assert (portions, spare.away_chunks) == ([4, 4, 1], 3)


def test_a_step_fetches_what_it_lacks_and_the_next_one_has_it() -> None:
    pool, terms = BlockPool(Ledger(160), 2, Lru()), arena_terms()
    spare = SpareMemory(pool, SpareRule(SpareMarks(low_chunks=1, high_chunks=2, hold_ms=0.0)), CHUNK_PAGES)
    scratch, orders = ElasticScratch(pool, terms, "kv", spare.recall_chunks), Orders()
    spare.carry_out_with(orders)
    for now_ms in range(20):
        spare.on_tick(float(now_ms), may_lend=True)
    orders.take()
    assert scratch.rows_allowed(64, 100) < 64
    (order,) = orders.take()
    spare.on_chunks_back(order.chunks, "")
    assert scratch.rows_allowed(64, 100) == 64
    pool.check()


def test_a_prompt_that_must_be_one_step_waits_for_memory_that_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(
        random.Random(3),
        layers=6,
        prefill_pages=240,
        decode_pages=240,
        host_pages=2000,
        layer_offload=6,
        elastic="kv",
        spare_memory="release",
        arena=arena_terms(max_rows=16, max_keys=200),
        max_step_tokens=16,
        kvstore="off",
        more=("mixed",),
    )
    world.greet()
    for _ in range(12):
        world.pass_time(900.0)
        world.settle()
    core = world.processes["mixed"].core
    assert core._memory.spare is not None and core._memory.spare.away_chunks > 20
    offload, called_off = core._scheduler.offload, 0

    def call_off(sequence: object) -> None:
        nonlocal called_off
        called_off += 1

    monkeypatch.setattr(offload, "call_off", call_off)
    core._scheduler.submit(
        NewPrompt(request=RequestId("r"), tokens=(7,) * 90, sampling=Sampling(max_tokens=2), root=ROOT)
    )
    assert core._scheduler.n_running == 1 and core.plan() is None and not called_off


def test_the_pool_gets_another_size_when_what_the_system_has_is_back() -> None:
    world = World(random.Random(1), prefill_pages=160, decode_pages=160, spare_memory="release", kvstore="off")
    world.greet()
    for _ in range(12):
        world.pass_time(900.0)
        world.settle()
    decode = world.processes["decode"].core
    assert decode._memory.spare is not None and decode._memory.spare.away_chunks > 10
    world.resize("decode", 80)
    world.settle()
    assert [(said.problem, said.pages) for said in world.resized] == [("", 80)]
    world.flaky = 1.0
    for _ in range(12):
        world.pass_time(900.0)
        world.settle()
    assert 10 < decode._memory.spare.away_chunks < 20, "by the marks of the new size"
    world.resize("decode", 120)
    world.settle()
    assert (world.resized[1].problem, world.resized[1].pages) == ("none left", 80)
    decode.check()


def test_a_tick_fetches_what_will_be_missed() -> None:
    spare, pool, orders = idle()
    orders.take()
    pool.alloc(A, 18, PageState.ACTIVE)  # nine of the ten chunks that are here
    spare.on_tick(200.0, may_lend=True)
    (order,) = orders.take()
    assert isinstance(order, TakeBackChunks)
    assert len(order.chunks) == 3
    spare.on_tick(300.0, may_lend=True)
    assert orders.take() == [], "they are coming"


@pytest.mark.parametrize("elastic", ["off", "kv"])
def test_answers_are_right_while_the_system_has_memory_for_a_while(elastic: str) -> None:
    rng = random.Random(1)
    arena = None if elastic == "off" else arena_terms(max_rows=32)
    more = {"spare_memory": "release", "elastic": elastic, "flaky": 0.3, "max_step_tokens": 32, "kvstore": "off"}
    world = World(rng, prefill_pages=160, decode_pages=160, arena=arena, **more)
    world.greet()
    for number in range(40):
        if number % 8 == 0:
            world.settle()
            for _ in range(6):
                world.pass_time(900.0)
                world.settle()
        prompt = [rng.randrange(2, 5)] * rng.choice([9, 30, 60]) + [number]
        world.send(f"r{number}", prompt, rng.randrange(1, 30))
        for _ in range(rng.randrange(20)):
            world.turn()
    require_unharmed(world)
    assert world.chunks.moved["returned"] > 0
    assert world.chunks.moved["refused"] > 0


def test_what_the_system_cannot_unmap_stays_and_is_tried_again_after_the_pause_of_the_rule() -> None:
    pool = BlockPool(Ledger(20 * CHUNK_PAGES), 2, Lru())
    spare, orders = (
        SpareMemory(pool, SpareRule(SpareMarks(low_chunks=3, high_chunks=6, hold_ms=100.0)), CHUNK_PAGES),
        Orders(),
    )
    spare.carry_out_with(orders)
    orders.problem = "no mapping left"
    asked = []
    for now_ms in (0.0, 100.0, 150.0, 199.0, 200.0):
        spare.on_tick(now_ms, may_lend=True)
        asked.append(len(orders.take()))
    assert asked == [0, 1, 0, 0, 1]
    assert (pool.available_pages, spare.away_chunks, spare.kept_chunks_total) == (20 * CHUNK_PAGES, 0, 20)
    pool.check()
