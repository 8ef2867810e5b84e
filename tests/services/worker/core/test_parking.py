"""Laws of parking: who gives way goes on where it stopped, nobody starves, and the buffer is empty in the end."""

import random
from collections.abc import Callable

import pytest

from common.block_hash import BlockHash
from common.ids import Owner, RequestId
from common.policy.eviction import Lru
from kvstore.index.block_pool import BlockPool
from kvstore.index.ledger import Ledger, PageState
from services.worker.core import giving_way
from services.worker.core.actions import FetchBlocks, Moved, StoreBlocks
from services.worker.core.freed import Freed
from services.worker.core.host_buffer import HOST_BUFFER
from services.worker.core.lineup import MOST_PASSES
from services.worker.core.parking import Parking
from services.worker.core.sequence import Sequence
from tests.support.fake_engine import answer
from tests.support.world import World
from tests.support.world_process import Process


def prompt(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(3, 900) for _ in range(tokens)]


def parking(process: Process) -> Parking:
    return process.core._scheduler.parking


def check_end(world: World) -> None:
    """Everybody is answered rightly, and both memories are as they were."""
    for name, seen in world.answers.items():
        assert seen.done, name
        if seen.failed is None and not seen.cancelled:
            assert seen.tokens == answer(seen.prompt, seen.max_tokens), name
    for process in world.processes.values():
        process.core.check()
        assert process.core.pool.available_pages == process.core.pool.ledger.total_pages
        assert parking(process).buffer.used_pages == 0


def scarce(rng: random.Random, *, host_pages: int = 200, role: str = "mixed", **more: object) -> World:
    """A worker whose pool holds some two of the requests of these tests."""
    settings = {"prefill_pages": 200, "decode_pages": 28, "caching": 0, "more": (role,), **more}
    world = World(rng, host_pages=host_pages, **settings)  # type: ignore[arg-type]  # a test's keywords
    world.greet()
    return world


def until(world: World, condition: Callable[[], bool]) -> None:
    """One event after the other; as time passes, if nothing else happens."""
    for _ in range(10_000):
        if condition():
            return
        if not world.turn():
            world.pass_time(100.0)
    raise AssertionError("it never happens")


def moving(process: Process, kind: type[FetchBlocks] | type[StoreBlocks]) -> bool:
    """Whether such a copy waits that concerns the buffer."""
    return any(isinstance(move.order, kind) and move.order.peer == HOST_BUFFER for move in process.moves)


def test_who_gave_way_is_not_computed_again_but_for_the_last_part_of_a_block() -> None:
    world = scarce(random.Random(1))
    for number in range(3):
        world.send(f"r{number}", prompt(world.rng, 12), 24, to="mixed")
    world.settle()
    check_end(world)
    core, parked = world.processes["mixed"].core, parking(world.processes["mixed"])
    assert parked.parked_total == parked.restored_total == core._scheduler.preemptions_total > 0
    surplus = core._scheduler.computed_tokens_total - 3 * (12 + 23)
    assert 0 <= surplus <= 4 * parked.restored_total


def test_without_room_in_the_buffer_who_gives_way_is_computed_again() -> None:
    world = scarce(random.Random(1), host_pages=4)
    for number in range(3):
        world.send(f"r{number}", prompt(world.rng, 12), 24, to="mixed")
    world.settle()
    check_end(world)
    core = world.processes["mixed"].core
    assert core._scheduler.preemptions_total > 0 and parking(world.processes["mixed"]).parked_total == 0


def test_a_restored_sequence_is_no_hit_of_the_cache() -> None:
    world = scarce(random.Random(1), caching=2)
    for number in range(3):
        world.send(f"r{number}", prompt(world.rng, 12), 24, to="mixed")
    world.settle()
    check_end(world)
    report = world.processes["mixed"].core.report(1, world.now_ms)
    assert report.counters["restored_total"] > 0
    hits = {name: count for name, count in report.counters.items() if name.startswith("hit_tokens_total")}
    assert not any(hits.values()), hits
    assert all(seen.deltas[0].cached_tokens == 0 for seen in world.answers.values())


PHASES: dict[str, Callable[[Process], bool]] = {
    "leaving": lambda process: moving(process, StoreBlocks),
    "parked": lambda process: parking(process).parked_total > parking(process).restored_total,
    "returning": lambda process: moving(process, FetchBlocks),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("end", ["cancel", "timeout", "abandon", "cut short"])
def test_whoever_ends_in_any_phase_leaves_nothing_behind(phase: str, end: str) -> None:
    world = scarce(random.Random(2), flaky=0.0)
    process = world.processes["mixed"]
    for number in range(4):
        world.send(f"r{number}", prompt(world.rng, 12), 30, to="mixed", timeout_ms=10**6)
    until(world, lambda: PHASES[phase](process))
    if end == "cancel":
        for request in list(world.answers):
            world.cancel(request)
    elif end == "timeout":
        world.pass_time(2.0 * 10**6)
    elif end == "abandon":
        world.perform(process, process.core.abandon())
    else:
        world.flaky = 1.0  # every copy fails from now on
    world.settle()
    check_end(world)


def test_the_same_request_may_come_again_while_its_first_copy_still_leaves() -> None:
    world = scarce(random.Random(3))
    process = world.processes["mixed"]
    for number in range(3):
        world.send(f"r{number}", prompt(world.rng, 12), 30, to="mixed")
    until(world, lambda: moving(process, StoreBlocks))
    scheduler = process.core._scheduler
    victim = next(name for name in world.answers if scheduler.parking.is_leaving(name))
    process.core._generation.forget(victim)
    assert victim not in scheduler.sequences and scheduler.parking.n_open
    world.answers[victim].cancelled = True
    world.settle()
    check_end(world)


def test_no_more_give_way_while_enough_pages_are_leaving() -> None:
    world = scarce(random.Random(4), decode_pages=32)
    process = world.processes["mixed"]
    for number in range(4):
        world.send(f"r{number}", prompt(world.rng, 11), 30, to="mixed")
    most = 0
    while world.turn():
        most = max(most, sum(isinstance(move.order, StoreBlocks) for move in process.moves))
    world.settle()
    check_end(world)
    assert most == 1


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_parked_when_all_work_ends_with_the_right_tokens(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(giving_way, "TURN_TOKENS", 2)  # more give way
    rng = random.Random(seed)
    world = scarce(
        rng,
        host_pages=rng.choice([8, 30, 60, 200]),
        decode_pages=rng.choice([24, 30, 44]),
        prefill_pages=rng.choice([28, 80]),
        store_blocks=rng.choice([0, 0, 40]),
        flaky=rng.choice([0.0, 0.0, 0.2]),
        caching=seed % 4,
        spill=rng.choice(["write-through", "write-back"]),
        ahead=seed % 2 == 1,
        max_step_tokens=rng.choice([16, 40]),
    )
    for number in range(rng.randrange(6, 16)):
        to = rng.choice(["mixed", "prefill", "decode"])
        world.send(f"r{number}", prompt(rng, rng.randrange(1, 24)), rng.randrange(1, 22), to=to)
        for _ in range(rng.randrange(0, 60)):
            world.turn()
        if rng.random() < 0.1:
            world.cancel(RequestId(f"r{rng.randrange(number + 1)}"))
    world.settle()
    world.pass_time(20_000.0)
    world.settle()
    check_end(world)


def test_a_waiting_grant_gets_the_room_of_running_requests_that_had_their_turn() -> None:
    """Two long answers fill the pool: with a buffer the third request draws its first token before either has ended."""

    def first_token_before_an_end(host_pages: int) -> bool:
        world = World(random.Random(5), prefill_pages=200, decode_pages=40, host_pages=host_pages, caching=0)
        world.greet()
        for name in ("a", "b"):
            world.send(name, prompt(world.rng, 8), 60 - 8 - 22)
        until(world, lambda: len(world.answers["a"].tokens) > 18 and len(world.answers["b"].tokens) > 18)
        world.send("late", prompt(world.rng, 24), 6)
        until(world, lambda: bool(world.answers["late"].tokens))
        early = not (world.answers["a"].done or world.answers["b"].done)
        world.settle()
        check_end(world)
        return early

    assert first_token_before_an_end(200)
    assert not first_token_before_an_end(0)


@pytest.mark.parametrize("seed", range(12))
def test_a_stream_of_grants_starves_nobody(seed: int) -> None:
    rng = random.Random(seed)
    world = World(
        rng, prefill_pages=200, decode_pages=44, host_pages=400, caching=rng.choice([0, 2]), ahead=seed % 2 == 1
    )
    world.greet()
    world.send("long", prompt(rng, 10), 30)
    sent = 0
    while not world.answers["long"].done and sent < 200:
        if sum(not seen.done for seen in world.answers.values()) < 6:
            world.send(f"r{sent}", prompt(rng, rng.randrange(8, 24)), rng.randrange(4, 24))
            sent += 1
        world.turn()
    assert world.answers["long"].done, "others went before it again and again"
    world.settle()
    check_end(world)


def test_who_gave_way_for_others_is_passed_only_so_often_and_who_had_to_is_not_passed() -> None:
    world = World(random.Random(6), prefill_pages=400, decode_pages=80, host_pages=900, caching=0)
    world.greet()
    scheduler = world.processes["decode"].core._scheduler
    for name in ("oldest", "victim"):
        world.send(name, prompt(world.rng, 40), 40)
    until(world, lambda: len(world.answers["victim"].tokens) > giving_way.TURN_TOKENS)
    passing = [f"short{number}" for number in range(30)]
    for name in passing:
        world.send(name, prompt(world.rng, 20), 1 + giving_way.TURN_TOKENS // 4)
    until(world, lambda: scheduler.n_waiting == 1)
    (victim,) = scheduler._lineup.waiting
    most = 0
    while victim in scheduler._lineup.waiting and world.turn():
        most = max(most, victim.passed or 0)
    assert 0 < most <= MOST_PASSES
    world.settle()
    check_end(world)


def test_nobody_gives_way_again_for_others_before_it_has_drawn_its_turn() -> None:
    world = World(random.Random(7), prefill_pages=400, decode_pages=44, host_pages=900, caching=0)
    world.greet()
    way, turns = world.processes["decode"].core._scheduler.giving_way, list[int]()
    volunteers = way._volunteers

    def seen() -> list[Sequence]:
        chosen = volunteers()
        turns.extend(len(one.tokens) - one.began_tokens for one in chosen)
        return chosen

    way._volunteers = seen
    for number in range(24):
        world.send(f"r{number}", prompt(world.rng, 8), 24)
    world.settle()
    check_end(world)
    assert turns and min(turns) >= giving_way.TURN_TOKENS


def test_nobody_gives_way_for_tokens_that_are_never_computed() -> None:
    """The pool holds all that both answers will ever need."""
    world = scarce(random.Random(0), decode_pages=2 * 8 * 2, host_pages=400, max_step_tokens=64, kvstore="off")
    for name in ("a", "b"):
        world.send(name, prompt(world.rng, 8), 25, to="mixed")
    world.settle()
    check_end(world)
    assert world.processes["mixed"].core._scheduler.preemptions_total == 0


def test_blocks_that_others_pin_too_are_not_freed_by_giving_way() -> None:
    """Four answers share a long prefix: what all but the oldest would free is too little, so that nobody is parked for it."""
    world = World(
        random.Random(0),
        prefill_pages=400,
        decode_pages=120,
        caching=2,
        host_pages=800,
        max_running=8,
        max_step_tokens=64,
        kvstore="off",
    )
    world.greet()
    scheduler, prefix = world.processes["decode"].core._scheduler, prompt(world.rng, 80)
    world.send("s0", [*prefix, *prompt(world.rng, 4)], 100, to="decode")
    until(world, lambda: bool(world.answers["s0"].tokens))
    for number in range(1, 4):
        world.send(f"s{number}", [*prefix, *prompt(world.rng, 4)], 24, to="decode")
    until(world, lambda: all(len(seen.tokens) >= 18 for seen in world.answers.values()))
    world.send("new", prompt(world.rng, 150), 20, to="prefill")
    until(world, lambda: world.answers["s3"].done)
    assert scheduler.preemptions_total == 0
    world.settle()
    check_end(world)


def test_a_slow_copy_of_long_ago_is_forgotten() -> None:
    world = scarce(random.Random(0))
    target = parking(world.processes["mixed"])
    for _ in range(12):
        target.learn(Moved(True, 2_000.0, 1, 1_000), world.now_ms)
    slow = target.bytes_per_s
    for _ in range(900):
        target.on_tick(world.now_ms)
        world.now_ms += 1_000.0
    assert target.bytes_per_s > 100 * slow
    learned = target.bytes_per_s
    world.pass_time(0.0)
    assert target.bytes_per_s >= learned, "the worker's ticks say so too"


def test_what_is_parked_does_not_wait_to_be_computed() -> None:
    world = scarce(random.Random(1))
    scheduler = world.processes["mixed"].core._scheduler
    for number in range(3):
        world.send(f"r{number}", prompt(world.rng, 12), 24, to="mixed")
    until(world, lambda: PHASES["parked"](world.processes["mixed"]))
    (waiting,) = (one for one in scheduler._lineup.waiting if one.found is not None)
    computed = sum(one.uncomputed_tokens for one in scheduler.prompts if one is not waiting)
    assert scheduler.queue().waiting_tokens - computed <= 4
    world.settle()
    check_end(world)


@pytest.mark.parametrize("seed", range(20))
def test_releasing_owners_makes_just_so_many_pages_available(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(Ledger(200), 2, Lru())
    names, owners = [BlockHash(bytes([n]) * 16) for n in range(12)], [Owner(f"o{n}") for n in range(4)]
    pages = pool.alloc(Owner("first"), 12, PageState.ACTIVE)
    pool.publish(Owner("first"), names, pages, parent=BlockHash(bytes(16)), depth=0)
    for owner in owners:
        if rng.random() < 0.8:
            pool.take(owner, names[: rng.randrange(1, 13)])
        pool.alloc(owner, rng.randrange(1, 6), PageState.ACTIVE)
    if rng.random() < 0.7:
        pool.release(Owner("first"))
    leaving, freed = rng.sample(owners, rng.randrange(1, 5)), Freed(pool)
    for owner in leaving:
        freed.add(owner)
    before = pool.available_pages
    for owner in leaving:
        pool.release(owner)
    assert freed.pages == pool.available_pages - before
