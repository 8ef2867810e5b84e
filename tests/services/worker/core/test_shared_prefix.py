"""A prefix that many prompts share is computed once per worker: the others wait for it, and for nobody who computes it no more."""

import random
from types import SimpleNamespace

import pytest

from common.block_hash import BlockHash, hash_blocks
from common.ids import RequestId
from common.kv_layout import KvLayout
from common.messages.requests import Sampling
from common.policy.batching import DecodeFirst
from common.policy.eviction import Lru
from kvstore.index.block_pool import BlockPool
from kvstore.index.ledger import Ledger
from services.worker.core.prefix import Keep, PrefixReuse
from services.worker.core.scheduler import Scheduler
from services.worker.core.sequence import NewPrompt, request_owner
from services.worker.core.shared_prefix import SharedPrefixes
from tests.services.worker.core.test_caching import check_end
from tests.support.fake_engine import FakeEngine
from tests.support.world import GATEWAY, World

ROLES = ("prefill", "mixed-1", "decode")
PREFIX = [(at * 11) % 900 + 3 for at in range(400)]


def world(*, seed: int = 3, pages: int = 4_000, **settings: object) -> World:
    made = World(
        random.Random(seed), prefill_pages=pages, decode_pages=pages, more=("mixed-1",), **{"caching": 2, **settings}
    )
    made.greet()
    return made


def arrive(target: World, to: str) -> None:
    """All requests that were sent come before anything is computed."""
    link = (GATEWAY, target.processes[to].peer)
    while target.links.get(link):
        target.carry(link)


def counters(target: World, to: str) -> dict[str, float]:
    return target.processes[to].core.report(0, target.now_ms).counters


def started(target: World, to: str, name: str) -> bool:
    return target.processes[to].core.pool.holds(request_owner(RequestId(name)))


def compute_steps(target: World, to: str, steps: int) -> None:
    process = target.processes[to]
    for _ in range(steps):
        step = process.step
        while step is not None and process.step is step:
            target.compute(process)


# -- computed once


@pytest.mark.parametrize("to", ROLES)
@pytest.mark.parametrize("tail", [0, 7])
def test_a_burst_of_siblings_computes_what_it_shares_once(to: str, tail: int) -> None:
    target = world(max_running=64)
    for number in range(16):
        target.send(f"s{number}", [*PREFIX, *(number + 3 for _ in range(tail))], 4, to=to)
    target.settle()
    check_end(target)
    totals = counters(target, to)
    generated = 0 if to == "prefill" else 16 * 3
    ideal = 400 + 15 * (4 if tail == 0 else 0) + 16 * tail
    assert ideal <= totals["computed_tokens_total"] - generated <= 1.3 * ideal
    assert totals["shared_prefix_waits_total"] == 15
    hits = totals["hit_tokens_total{tier=device}"]
    assert hits + totals["missed_tokens_total"] == 16 * (400 + tail) and totals["missed_tokens_total"] == ideal
    assert sum(seen.deltas[0].cached_tokens for seen in target.answers.values()) == hits


@pytest.mark.parametrize("to", ROLES)
def test_a_sibling_that_is_longer_than_a_whole_prompt_waits_for_all_of_it(to: str) -> None:
    target = world()
    target.send("whole", PREFIX[:36], 4, to=to)  # its last step computes its last block alone
    target.send("longer", PREFIX[:50], 4, to=to)
    arrive(target, to)
    target.settle()
    check_end(target)
    assert target.answers[RequestId("longer")].deltas[0].cached_tokens == 36


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("to", ["prefill", "mixed-1"])
def test_what_the_store_has_of_a_burst_is_loaded_once(to: str, transport: str) -> None:
    target = world(transport=transport, store_blocks=400, pages=220, spill="write-through")
    target.send("first", PREFIX[:200], 2, to=to)
    target.settle()
    for number in range(4):
        target.send(f"other{number}", [number + 5] * 200, 2, to=to)
        target.settle()
    before = counters(target, to)
    for number in range(8):
        target.send(f"s{number}", PREFIX[:200], 2, to=to)
    target.settle()
    check_end(target)
    after = counters(target, to)
    loaded = after["hit_tokens_total{tier=host}"] - before["hit_tokens_total{tier=host}"]
    assert 0 < loaded < 200
    assert after["load_failures_total"] == 0


def test_a_load_that_fails_lets_one_sibling_compute_for_all() -> None:
    target = world(store_blocks=400, pages=220, spill="write-through")
    target.send("first", PREFIX[:200], 2)
    target.settle()
    for number in range(4):
        target.send(f"other{number}", [number + 5] * 200, 2)
        target.settle()
    before, target.flaky = counters(target, "prefill"), 1.0
    for number in range(8):
        target.send(f"s{number}", PREFIX[:200], 2)
    target.settle()
    check_end(target)
    after = counters(target, "prefill")
    assert after["load_failures_total"] > 0
    (link,) = target.processes["prefill"].core.report(0, target.now_ms).links
    assert link.bytes_per_s < 0.6 * 2**30, "less than its probe said"
    assert after["computed_tokens_total"] - before["computed_tokens_total"] <= 1.3 * (2 * 200 + 7 * 4)


@pytest.mark.parametrize("to", ROLES)
def test_nobody_waits_where_nothing_is_kept(to: str) -> None:
    target = world(caching=0, max_running=64)
    for number in range(4):
        target.send(f"s{number}", PREFIX[:80], 2, to=to)
    arrive(target, to)
    assert counters(target, to)["shared_prefix_waits_total"] == 0
    assert all(started(target, to, f"s{number}") for number in range(2))
    target.settle()
    check_end(target)


def test_different_salts_do_not_wait_for_each_other() -> None:
    target = world()
    for salt in ("a", "b"):
        target.send(salt, PREFIX, 2, cache_salt=salt)
    arrive(target, "prefill")
    assert started(target, "prefill", "a") and started(target, "prefill", "b")
    target.settle()
    check_end(target)


# -- who waits, for whom, how long


@pytest.mark.parametrize("to", ROLES)
def test_others_pass_a_burst_of_siblings(to: str) -> None:
    target = world(max_running=64)
    for number in range(8):
        target.send(f"s{number}", PREFIX, 2, to=to)
    target.send("other", [9, 8, 7, 6, 5, 4], 2, to=to)
    arrive(target, to)
    assert [started(target, to, name) for name in ("s0", "s1", "s7", "other")] == [True, False, False, True]
    target.settle()
    check_end(target)


@pytest.mark.parametrize("to", ROLES)
def test_when_the_one_that_computes_is_cancelled_the_next_goes_on_from_where_it_was(to: str) -> None:
    target = world(max_running=64)
    for number in range(6):
        target.send(f"s{number}", PREFIX, 2, to=to)
    arrive(target, to)
    compute_steps(target, to, 5)  # of 16 tokens
    target.cancel(RequestId("s0"))
    arrive(target, to)
    target.settle()
    check_end(target)
    computed = counters(target, to)["computed_tokens_total"]
    assert computed <= 1.3 * (400 + 5 * 4) + 16


@pytest.mark.parametrize("to", ROLES)
def test_who_waits_for_a_sibling_still_runs_out_of_time(to: str) -> None:
    target = world()
    target.send("s0", PREFIX, 2, to=to)
    target.send("s1", PREFIX, 2, timeout_ms=300, to=to)
    arrive(target, to)
    target.pass_time(400.0)
    while any(queue for link, queue in target.links.items() if link[1] == GATEWAY):
        for link in [link for link, queue in target.links.items() if queue and link[1] == GATEWAY]:
            target.carry(link)
    failed = target.answers[RequestId("s1")].failed
    assert failed is not None and failed.code == "deadline_exceeded"
    target.settle()
    check_end(target)


@pytest.mark.parametrize("to", ROLES)
def test_who_computes_runs_out_of_time_and_the_sibling_goes_on(to: str) -> None:
    target = world()
    target.send("s0", PREFIX, 2, timeout_ms=300, to=to)
    target.send("s1", PREFIX, 2, to=to)
    arrive(target, to)
    target.pass_time(400.0)
    target.settle()
    check_end(target)
    assert target.answers[RequestId("s0")].failed is not None
    assert target.answers[RequestId("s1")].finish == "length"


# -- the rule by itself

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=8, dtype="float32", block_tokens=4)
ROOT = BlockHash(bytes(16))
ENGINE = FakeEngine(layers=2, block_tokens=4)


def parts(pages: int = 400, *, keep: Keep = Keep.PROMPTS) -> tuple[Scheduler, SharedPrefixes]:
    pool = BlockPool(Ledger(pages), LAYOUT.layers, Lru())
    scheduler = Scheduler(PrefixReuse(pool, keep, 4), LAYOUT, DecodeFirst(16, 4), max_running=8, context_tokens=1_000)
    return scheduler, SharedPrefixes(pool, scheduler, 4, keeps=keep is not Keep.NOTHING)


def submit(target: Scheduler, name: str, tokens: list[int], max_tokens: int = 4) -> None:
    sampling = Sampling(max_tokens=max_tokens)
    target.submit(NewPrompt(request=RequestId(name), tokens=tuple(tokens), sampling=sampling, root=ROOT))


def waiting(tokens: list[int]) -> SimpleNamespace:
    return SimpleNamespace(names=hash_blocks(tokens[:-1], ROOT, 4), leader=None, shared_blocks=0)


def step(target: Scheduler) -> None:
    target.complete(ENGINE.step(target.plan(), None))


def test_who_shares_less_waits_no_longer_than_for_what_it_shares() -> None:
    scheduler, shared = parts()
    submit(scheduler, "leader", PREFIX[:64])
    prompt = waiting([*PREFIX[:20], 1, 2, 3, 4, 5])
    held = []
    for _ in range(4):
        held.append(shared.holds(prompt))  # type: ignore[arg-type]  # the fields that are used
        step(scheduler)
    assert held == [True, True, False, False] and shared.waits_total == 1


def test_who_shares_nothing_that_is_missing_does_not_wait() -> None:
    scheduler, shared = parts()
    submit(scheduler, "leader", PREFIX[:64])
    step(scheduler)
    for tokens in ([1, 2, 3, 4, 5, 6], PREFIX[:16] + [1] * 9, PREFIX[:3]):
        assert not shared.holds(waiting(tokens))  # type: ignore[arg-type]  # the fields that are used
    assert shared.waits_total == 0


def test_blocks_of_an_answer_are_not_waited_for() -> None:
    """They are not known before they are drawn."""
    scheduler, shared = parts(keep=Keep.ALL)
    submit(scheduler, "leader", PREFIX[:8], max_tokens=40)
    for _ in range(6):
        step(scheduler)
    tokens = scheduler.sequences[RequestId("leader")].tokens
    assert not shared.holds(waiting([*tokens, 1, 2, 3, 4, 5]))  # type: ignore[arg-type]  # the fields that are used


def test_blocks_of_an_answer_that_is_computed_again_but_not_kept_are_not_waited_for() -> None:
    scheduler, shared = parts(pages=30, keep=Keep.PROMPTS)  # fifteen blocks
    submit(scheduler, "old", [5] * 16, max_tokens=40)
    submit(scheduler, "young", PREFIX[:16], max_tokens=40)
    while not scheduler.preemptions_total:
        step(scheduler)
    tokens = list(scheduler.sequences[RequestId("young")].tokens)
    assert len(tokens) > 24
    scheduler.drop(RequestId("old"))
    scheduler.plan()
    assert not shared.holds(waiting([*tokens, 1, 2, 3, 4]))  # type: ignore[arg-type]  # the fields that are used


@pytest.mark.parametrize("end", ["drop", "preempt"])
def test_nobody_waits_for_one_that_was_dropped_or_gave_its_pages_up(end: str) -> None:
    scheduler, shared = parts(pages=30)  # fifteen blocks
    submit(scheduler, "old", [5] * 16, max_tokens=40)
    step(scheduler)
    submit(scheduler, "leader", PREFIX[:36])
    prompt = waiting(PREFIX[:36])
    assert shared.holds(prompt)  # type: ignore[arg-type]  # the fields that are used
    if end == "drop":
        scheduler.drop(RequestId("leader"))
    else:
        scheduler._policy = DecodeFirst(1, 4)  # the leader stands still while the old one grows
        while not scheduler.preemptions_total:
            step(scheduler)
    assert not shared.holds(prompt)  # type: ignore[arg-type]  # the fields that are used


def test_of_two_that_compute_the_same_the_other_is_waited_for_when_one_is_gone() -> None:
    scheduler, shared = parts()
    submit(scheduler, "one", PREFIX[:64])
    submit(scheduler, "two", PREFIX[:64])
    prompt = waiting(PREFIX[:64])
    assert shared.holds(prompt)  # type: ignore[arg-type]  # the fields that are used
    scheduler.drop(RequestId("one"))
    assert shared.holds(prompt)  # type: ignore[arg-type]  # the fields that are used
    scheduler.drop(RequestId("two"))
    assert not shared.holds(prompt)  # type: ignore[arg-type]  # the fields that are used
    assert shared.waits_total == 1


# -- whatever happens


@pytest.mark.parametrize("seed", range(30))
def test_bursts_of_siblings_end_rightly_whatever_happens_to_them(seed: int) -> None:
    rng = random.Random(seed)
    target = World(
        rng,
        prefill_pages=rng.choice([28, 40, 120]),
        decode_pages=rng.choice([40, 60, 140]),
        transport=rng.choice(["shm", "tcp"]),
        store_blocks=rng.choice([0, 12, 200]),
        flaky=rng.choice([0.0, 0.0, 0.3]),
        more=("mixed-1",),
        caching=rng.randrange(4),
        max_running=rng.choice([1, 2, 5]),
        spill=rng.choice(["write-through", "write-back", "selective"]),
        ahead=seed % 2 == 1,
    )
    target.greet()
    prefixes = [[rng.randrange(3, 900) for _ in range(n)] for n in (8, 16, 23, 30)]
    number = 0
    for _ in range(rng.randrange(2, 6)):
        to, prefix = rng.choice(ROLES), rng.choice(prefixes)
        for _ in range(rng.randrange(2, 9)):
            tail = [rng.randrange(3, 900) for _ in range(rng.choice([0, 0, 1, 5, 9]))]
            timeout_ms, priority = rng.choice([10**6, 10**6, 2_000]), rng.choice([0, 0, 1])
            target.send(
                f"r{number}", prefix + tail, rng.randrange(1, 9), to=to, timeout_ms=timeout_ms, priority=priority
            )
            number += 1
            if rng.random() < 0.15:
                target.cancel(RequestId(f"r{rng.randrange(number)}"))
        for _ in range(rng.randrange(0, 150)):
            target.turn()
        if rng.random() < 0.3:
            target.pass_time(rng.choice([100.0, 1_000.0, 4_000.0]))
        if rng.random() < 0.1:
            role = rng.choice(ROLES)
            target.kill(role)
            target.start(role)
            target.greet()
    target.settle()
    target.pass_time(20_000.0)
    target.settle()
    check_end(target)
    for process in target.processes.values():
        totals = process.core.report(0, target.now_ms).counters
        assert totals["shared_prefix_waits_total"] <= number
