"""Whatever a worker does with its memory, the parts that it reports add up to all of it, and agree with its pages."""

import random

from common.ids import Incarnation, Owner, WorkerId
from common.messages.liveness import Member, Report
from kvstore.index.block_pool import BlockPool
from kvstore.index.ledger import PageState
from services.worker.build_core import build_core
from services.worker.build_parts import Machine
from services.worker.core.memory_owners import Buffered, Lent, MemoryOwners
from services.worker.core.resizing import PoolSize, Resizing
from services.worker.settings import WorkerSettings
from tests.kvstore.index.chains import ROOT, block_pool, straight
from tests.support.world import World
from tests.support.world_process import LAYOUT

PAGE_BYTES, WEIGHT_BYTES = 64, 1000
PROMPT = [(at * 7) % 900 + 3 for at in range(60)]


def owners(pool: BlockPool, **told: object) -> MemoryOwners:
    size = PoolSize(pool.ledger.total_pages, page_bytes=PAGE_BYTES)
    resizing = Resizing(pool, size, worker="w", block_tokens=16)
    return MemoryOwners(pool, resizing, weight_bytes=WEIGHT_BYTES, **told)  # type: ignore[arg-type]  # a builder


def by_owner(memory: MemoryOwners, tier: str = "device") -> dict[str, int]:
    return {part.owner: part.n_bytes for part in memory.parts() if part.tier == tier}


def test_device_parts_add_up_to_the_pool_and_agree_with_pages_in_every_state_of_a_system() -> None:
    target = World(random.Random(3), prefill_pages=96, decode_pages=96)
    target.greet()
    for number in range(6):
        target.send(f"r{number}", [*PROMPT[: 20 + 8 * number], number + 3], 8)
    seen = set[str]()
    for turn in range(700):
        if turn in (150, 300):
            target.resize("decode", 48 if turn == 150 else 128, call=turn)
        if not target.turn():
            target.pass_time(50.0)
        for process in target.processes.values():
            report = process.core.report(0, target.now_ms)
            check(report)
            seen |= {part.owner for part in report.memory if part.n_bytes}
    assert seen >= {"kv_requests", "kv_prefix", "kv_free"}


def check(report: Report) -> None:
    parts = {part.owner: part.n_bytes for part in report.memory}
    pages = report.pages
    assert sum(parts.values()) == report.gauges["pool_bytes"]
    assert min(parts.values()) >= 0
    assert parts["kv_requests"] + parts["kv_prefix"] == (pages.total - pages.free) * LAYOUT.page_bytes


def test_what_the_engine_keeps_for_steps_is_reported_as_activations() -> None:
    size, kept_bytes = PoolSize(20, 1, LAYOUT.page_bytes), [0]
    machine = Machine(size=size, layout=LAYOUT, own_scratch_bytes=lambda: kept_bytes[0])
    mine = Member(id=WorkerId("w"), role="prefill", incarnation=Incarnation(1), endpoint="", host="", pid=1)
    core = build_core(mine, WorkerSettings(model="m"), machine)
    kept_bytes[0] = 700
    parts = {part.owner: part.n_bytes for part in core.report(0, 0.0).memory}
    assert (parts["activations"], sum(parts.values())) == (700, 700 + 20 * LAYOUT.page_bytes)


def test_weights_are_a_part_of_the_device() -> None:
    memory = owners(block_pool(8))
    assert by_owner(memory)["weights"] == WEIGHT_BYTES
    assert sum(by_owner(memory).values()) == WEIGHT_BYTES + 8 * memory._pool.pages_per_block * PAGE_BYTES


def test_a_cached_block_is_its_requests_while_that_runs_and_a_prefix_afterwards() -> None:
    pool, names, owner = block_pool(8), straight(3), Owner("a")
    memory, block_bytes = owners(pool), pool.pages_per_block * PAGE_BYTES
    pages = pool.alloc(owner, 3, PageState.ACTIVE)
    pool.publish(owner, names[:2], pages[:2], parent=ROOT, depth=0)
    assert (by_owner(memory)["kv_requests"], by_owner(memory)["kv_prefix"]) == (3 * block_bytes, 0)
    pool.release(owner)
    assert (by_owner(memory)["kv_requests"], by_owner(memory)["kv_prefix"]) == (0, 2 * block_bytes)


def test_lent_pages_belong_to_whom_they_are_lent_and_the_sum_stays() -> None:
    pool = block_pool(8)
    lent = Lent(activation_pages=3, system_pages=2, scratch_bytes=500)
    before, parts = by_owner(owners(pool)), by_owner(owners(pool, lent=lambda: lent))
    assert (parts["activations"], parts["released"]) == (500 + 3 * PAGE_BYTES, 2 * PAGE_BYTES)
    assert before["kv_free"] - parts["kv_free"] == 5 * PAGE_BYTES
    assert sum(parts.values()) == sum(before.values()) + 500


def test_the_host_buffer_is_a_tier_of_its_own_where_there_is_one() -> None:
    pool = block_pool(8)
    assert by_owner(owners(pool), "host") == {}
    buffered = owners(pool, buffered=lambda: Buffered(used_pages=6, capacity_pages=10))
    assert by_owner(buffered, "host") == {"parked": 6 * PAGE_BYTES, "parked_free": 4 * PAGE_BYTES}
