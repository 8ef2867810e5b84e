"""Laws of prompts whose layers go to their decode worker while they are computed: right tokens, no page lost, nobody waits."""

import random

import pytest

from common.errors import ConfigError
from common.ids import Incarnation, RequestId, WorkerId
from common.messages.handover import Grant
from common.messages.liveness import Member
from common.policy.transfer import Granularity
from services.worker.build_core import build_core
from services.worker.build_parts import Machine
from services.worker.core.actions import Copy, Moved
from services.worker.core.layer_streams import LayerStreams
from services.worker.core.prefill import PrefillCore
from services.worker.core.resizing import PoolSize
from services.worker.settings import WorkerSettings
from tests.services.worker.core.arenas import Linear, arena_terms
from tests.support.fake_engine import answer
from tests.support.world import GATEWAY, World
from tests.support.world_process import LAYOUT, Process

LAYERS = 6
POOL_PAGES = 8 * LAYERS
"""8 blocks of 4 tokens: with a ring of two layers, 24 blocks."""


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer takes several."""
    monkeypatch.setattr("services.worker.build_core._COPY_BYTES", 4 * LAYOUT.page_bytes)


def prompt(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(3, 900) for _ in range(tokens)]


def tight(seed: int = 0, **more: object) -> World:
    """A prefill worker whose pool is too small for half of a prompt of 64 tokens or more."""
    settings = {"prefill_pages": POOL_PAGES, "decode_pages": 60 * LAYERS, "layer_offload": "auto", **more}
    world = World(random.Random(seed), layers=LAYERS, **settings)  # type: ignore[arg-type]  # a test's keywords
    world.greet()
    return world


def streams(world: World) -> LayerStreams:
    core = world.processes["prefill"].core
    assert isinstance(core, PrefillCore)
    return core._streams


def assert_settled(world: World) -> None:
    """Everybody was answered rightly, and nothing is left anywhere."""
    for request, seen in world.answers.items():
        assert seen.done, request
        if seen.finish is not None and not seen.cancelled:
            assert seen.tokens == answer(seen.prompt, seen.max_tokens)
    for process in world.processes.values():
        if process.alive:
            process.core.check()
            assert process.core.pool.available_pages == process.core.pool.usable_pages - lent(process)
            assert process.core.pool.cache.n_pinned == 0
            assert not process.rings, "a gate is left closed"


def lent(process: Process) -> int:
    """Pages that serve steps, and need not last."""
    counts = process.core.pool.ledger.counts()
    return counts.lent - process.core.pool.lent.lasting_pages


def until(world: World, true: object) -> None:
    """Let things happen until that is so."""
    while not true():  # type: ignore[operator]
        assert world.turn(), "it never came about"


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("leaving", [3, 5, 6, "auto"])
@pytest.mark.parametrize("seed", range(3))
def test_a_prompt_that_fits_only_without_all_of_its_layers_gets_its_tokens(
    seed: int, leaving: object, transport: str
) -> None:
    world = tight(seed, transport=transport, layer_offload=leaving)
    tokens = {3: 36, 5: 60, 6: 90, "auto": 96}[leaving]  # 9, 15, 23 and 24 of the pool's 8 blocks
    world.send("r", prompt(world.rng, tokens), 6)
    world.settle()
    assert world.answers[RequestId("r")].finish == "length"
    assert streams(world).counters() == {
        "layerwise_prompts_total": 1.0,
        "layerwise_layers_total": float(LAYERS if leaving == "auto" else leaving),
    }
    assert_settled(world)


def test_one_that_fits_with_all_of_its_layers_is_computed_as_ever() -> None:
    world = tight()
    world.send("r", prompt(world.rng, 32), 6)
    world.settle()
    assert streams(world).prompts_total == 0
    assert world.answers[RequestId("r")].finish == "length"
    assert_settled(world)


@pytest.mark.parametrize(
    "settings", [{"layer_offload": "off"}, {"transfer": "request"}, {"transfer": "aggregated"}, {"layer_offload": 2}]
)
def test_without_layers_that_leave_one_by_one_it_is_refused_as_ever(settings: dict[str, object]) -> None:
    world = tight(**settings)
    world.send("r", prompt(world.rng, 60), 6)
    world.settle()
    failed = world.answers[RequestId("r")].failed
    assert failed is not None and failed.code == "out_of_pages"
    assert_settled(world)


@pytest.mark.parametrize("role", ["prefill", "decode", "mixed"])
def test_more_layers_than_the_model_has_are_refused_whatever_the_worker_does(role: str) -> None:
    machine = Machine(size=PoolSize(20, 1, LAYOUT.page_bytes), layout=LAYOUT)
    mine = Member(id=WorkerId("w"), role=role, incarnation=Incarnation(1), endpoint="", host="", pid=1)
    with pytest.raises(ConfigError, match=r"--layer-offload=99: the model has 2 layers"):
        build_core(mine, WorkerSettings(model="m", layer_offload=99), machine)


def test_one_that_does_not_fit_even_so_is_refused() -> None:
    world = tight()
    world.send("r", prompt(world.rng, 97), 6)
    world.settle()
    failed = world.answers[RequestId("r")].failed
    assert failed is not None and failed.code == "out_of_pages"
    assert_settled(world)


def test_without_a_grant_it_is_not_computed() -> None:
    world = tight()
    prefill, decode = world.processes["prefill"], world.processes["decode"]
    world.send("r", prompt(world.rng, 90), 6)
    until(world, lambda: any(isinstance(m, Grant) for m, _ in world.links.get((decode.peer, prefill.peer), ())))
    withheld = world.links.pop((decode.peer, prefill.peer))
    while world.turn():
        assert prefill.step is None
    assert prefill.core.pool.available_pages < POOL_PAGES, "it has its pages: who is granted waits for nobody's"
    world.links[decode.peer, prefill.peer] = withheld
    world.settle()
    assert world.answers[RequestId("r")].finish == "length"
    assert_settled(world)


def test_its_pages_are_free_before_the_decode_worker_has_said_that_it_has_all() -> None:
    world = tight()
    world.send("r", prompt(world.rng, 90), 6)
    prefill = world.processes["prefill"]
    until(world, lambda: streams(world).layers_total == LAYERS and not prefill.copies)
    assert world.answers[RequestId("r")].tokens == [] and not prefill.core.idle
    assert prefill.core.pool.available_pages == POOL_PAGES
    world.settle()
    assert_settled(world)


def test_the_engine_is_never_more_than_the_ring_ahead_of_the_copies() -> None:
    world = tight()
    world.send("r", prompt(world.rng, 90), 6)
    prefill, furthest = world.processes["prefill"], 0
    copies = prefill.copies
    prefill.copies = type(copies)()  # nothing is copied
    while world.turn():
        while prefill.copies:
            copies.append(prefill.copies.popleft())
        furthest = max(furthest, prefill.layer)
    assert furthest == 2
    prefill.copies = copies
    world.settle()
    assert_settled(world)


@pytest.mark.parametrize("end", ["cancel", "deadline", "death", "failed copy"])
def test_whoever_is_over_while_the_engine_waits_holds_it_back_no_longer(end: str) -> None:
    world = tight()
    world.send("r", prompt(world.rng, 90), 6, timeout_ms=2_000)
    prefill = world.processes["prefill"]
    until(world, lambda: bool(prefill.copies) and prefill.layer == 2 and prefill.is_ring_closed)
    held = list(prefill.copies)
    prefill.copies.clear()
    if end == "cancel":
        world.cancel(RequestId("r"))
    elif end == "deadline":
        world.pass_time(2_001.0)
    elif end == "death":
        world.kill("decode")
    else:
        fail(world, prefill, held.pop(0))
    while world.turn():  # what is in flight has not ended
        pass
    assert prefill.step is None, "the step ran to its end"
    if held:
        assert prefill.core.pool.available_pages < POOL_PAGES, "a copy still reads its pages"
    prefill.copies.extend(held)
    world.settle()
    assert_settled(world)


def fail(world: World, process: Process, copy: Copy) -> None:

    order = copy.order
    world.perform(process, process.core.on_copied(order.transfer, order.span, Moved(False), world.now_ms))


def test_a_process_that_ends_lets_its_engine_go_on() -> None:
    world = tight()
    world.send("r", prompt(world.rng, 90), 6)
    prefill = world.processes["prefill"]
    until(world, lambda: prefill.layer == 2 and prefill.is_ring_closed)
    world.perform(prefill, prefill.core.abandon())
    assert not prefill.is_ring_closed


def test_nothing_is_published_of_it_and_what_was_cached_is_reused() -> None:
    world = tight(caching=1)
    shared = prompt(world.rng, 12)
    world.send("first", shared + prompt(world.rng, 5), 2)
    world.settle()
    prefill = world.processes["prefill"]
    cached = len(prefill.core.pool.cache)
    world.send("r", shared + prompt(world.rng, 50), 2)
    world.settle()
    seen = world.answers[RequestId("r")]
    assert streams(world).prompts_total == 1
    assert [delta.cached_tokens for delta in seen.deltas if delta.cached_tokens is not None] == [12]
    assert len(prefill.core.pool.cache) <= cached
    assert_settled(world)


def test_one_that_has_no_room_beside_its_cached_beginning_is_computed_without_it() -> None:
    world = tight(caching=1)
    shared = prompt(world.rng, 24)
    world.send("first", shared + prompt(world.rng, 5), 2)
    world.settle()
    world.send("r", shared + prompt(world.rng, 68), 2)
    world.settle()
    assert streams(world).prompts_total == 1 and world.answers[RequestId("r")].finish == "length"
    assert_settled(world)


def test_what_another_process_keeps_for_it_is_given_back() -> None:
    world = tight(caching=1, store_blocks=100, prefill_pages=12 * LAYERS)
    shared = prompt(world.rng, 40)
    world.send("first", shared + prompt(world.rng, 4), 2)
    world.settle()
    world.send("other", prompt(world.rng, 44), 2)  # what was cached goes
    world.settle()
    world.send("r", shared + prompt(world.rng, 40), 2)
    world.settle()
    assert streams(world).prompts_total == 1
    assert world.store is not None and world.store.core.report(1, world.now_ms).gauges["pinned_blocks"] == 0.0
    assert_settled(world)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("seed", range(24))
def test_after_any_mix_of_cancels_and_deaths_everybody_is_answered_and_no_page_is_lost(
    seed: int, transport: str
) -> None:
    rng = random.Random(seed)
    world = tight(
        seed,
        transport=transport,
        prefill_pages=rng.randrange(5, 16) * LAYERS,
        decode_pages=rng.randrange(28, 60) * LAYERS,
        layer_offload=rng.choice(["auto", 6, 5, 4]),
        caching=rng.choice([0, 1, 3]),
        store_blocks=rng.choice([0, 60]),
        more=("decode-1",) if seed % 3 == 0 else (),
        ahead=seed % 2 == 1,
    )
    shared = prompt(rng, 30)
    for number in range(12):
        tokens = shared[: rng.randrange(30)] + prompt(rng, rng.randrange(1, 60))
        world.send(f"r{number}", tokens, rng.randrange(1, 10), timeout_ms=rng.choice([10**6, 3_000]))
        for _ in range(rng.randrange(80)):
            world.turn()
        chance = rng.random()
        if chance < 0.3:
            world.cancel(rng.choice(list(world.answers)))
        elif chance < 0.45:
            role = rng.choice(["prefill", "decode", "decode"])
            world.kill(role)
            world.start(role)
            world.greet()
        elif chance < 0.6:
            world.pass_time(rng.choice([1.0, 600.0, 2500.0]))
        elif chance < 0.7 and seed % 4 < 2:
            world.resize("prefill", rng.randrange(4, 16) * LAYERS)
    world.settle()
    assert_settled(world)


@pytest.mark.parametrize("mode", ["static", "kv", "full"])
@pytest.mark.parametrize("seed", range(6))
def test_with_scratch_out_of_the_same_memory_everybody_is_answered(seed: int, mode: str) -> None:
    rng = random.Random(seed)
    terms = arena_terms(max_rows=16, step=Linear(row_bytes=64), max_keys=200)
    world = tight(seed, prefill_pages=30 * LAYERS, decode_pages=300 * LAYERS, arena=terms, elastic=mode, host_pages=600)
    for number in range(12):
        world.send(f"r{number}", prompt(rng, rng.choice([8, 40, 150, 180])), rng.randrange(1, 6))
        for _ in range(rng.randrange(60)):
            world.turn()
    world.settle()
    assert streams(world).prompts_total > 0
    for request, seen in world.answers.items():
        assert seen.finish or (seen.failed is not None and seen.failed.retryable), request
    assert_settled(world)


def test_a_hand_over_that_is_said_again_does_not_send_pages_that_are_used_again() -> None:
    world = tight(transport="tcp")
    world.send("r", prompt(world.rng, 90), 6)
    prefill = world.processes["prefill"]
    until(world, lambda: streams(world).layers_total == LAYERS and not prefill.copies)
    late = {link: queue for link, queue in world.links.items() if link[1] != GATEWAY and queue}
    world.links = {link: queue for link, queue in world.links.items() if link not in late}
    world.pass_time(2_001.0)  # the hand-over is said again
    assert not prefill.copies
    for link, queue in late.items():
        queue.extend(world.links.get(link, ()))
        world.links[link] = queue
    world.settle()
    assert world.answers[RequestId("r")].finish == "length"
    assert_settled(world)


def test_the_transfer_goes_by_layer_whatever_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.worker.core.asking.choose", lambda *_, **__: Granularity.AGGREGATED)
    world = tight()
    world.send("r", prompt(world.rng, 90), 2)
    world.send("whole", prompt(world.rng, 30), 2)
    world.settle()
    core = world.processes["prefill"].core
    assert isinstance(core, PrefillCore) and set(core._totals.copies) == {Granularity.LAYER, Granularity.AGGREGATED}
    assert_settled(world)


def withhold(world: World, request: str) -> Grant:
    """Let things happen until nothing does, but for the grant of this request."""
    link = world.processes["decode"].peer, world.processes["prefill"].peer
    found: list[Grant] = []
    core = world.processes["prefill"].core
    assert isinstance(core, PrefillCore)
    while True:
        for message, payloads in list(world.links.get(link, ())):
            if isinstance(message, Grant) and core._requests[message.transfer] == request:
                world.links[link].remove((message, payloads))
                found.append(message)
        if not world.turn():
            return found[0]


def deliver(world: World, grant: Grant) -> None:
    world.post(world.processes["decode"].peer, world.processes["prefill"].peer, grant)


def short_of_scratch(decode_blocks: int = 300) -> World:
    terms = arena_terms(max_rows=16, step=Linear(row_bytes=64), max_keys=200)
    return tight(prefill_pages=30 * LAYERS, decode_pages=decode_blocks * LAYERS, arena=terms, elastic="kv")


def rest(world: World) -> None:
    """Let things happen until only time could move anything."""
    while world.turn():
        pass


@pytest.mark.parametrize("tokens", [40, 116])
def test_whoever_begins_later_leaves_the_scratch_that_its_step_needs(tokens: int) -> None:
    world = short_of_scratch(decode_blocks=50)
    world.send("r", prompt(world.rng, 150), 2)  # 13 blocks for its ring, 32 pages for its step
    grant = withhold(world, "r")
    # with all of its layers (40) or without (116), it would leave fewer than 32 pages, and wait for a grant behind that of `r`
    world.send("other", prompt(world.rng, tokens), 2)
    rest(world)
    deliver(world, grant)
    rest(world)
    assert all(seen.finish == "length" for seen in world.answers.values()), "each had what the other waited for"
    world.settle()
    assert_settled(world)


def test_nobody_new_takes_the_room_that_its_step_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    world = short_of_scratch()
    prefill = world.processes["prefill"]
    world.send("r", prompt(world.rng, 150), 2)
    grant = withhold(world, "r")
    world.send("other", prompt(world.rng, 12), 2)
    others = withhold(world, "other")
    with monkeypatch.context() as scattered:  # pages enough, but no whole chunk of them
        scattered.setattr(prefill.core.pool.lent, "lendable", lambda _: 0)
        deliver(world, grant)
        rest(world)
        assert streams(world).starved == 1 and prefill.step is None
        world.send("new", prompt(world.rng, 4), 2)
        rest(world)
    assert not world.answers[RequestId("new")].tokens
    deliver(world, others)
    world.settle()
    assert all(seen.finish == "length" for seen in world.answers.values())
    assert_settled(world)


def test_one_that_will_never_have_scratch_fails_and_may_be_tried_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    world = short_of_scratch()
    monkeypatch.setattr(world.processes["prefill"].core.pool.lent, "lendable", lambda _: 0)
    world.send("r", prompt(world.rng, 150), 2)
    while world.turn():
        pass
    world.pass_time(1.0)
    world.settle()
    failed = world.answers[RequestId("r")].failed
    assert failed is not None and (failed.code, failed.retryable) == ("busy", True)
    assert_settled(world)


def test_one_that_lacks_scratch_fails_if_all_others_wait_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = short_of_scratch(decode_blocks=43)
    monkeypatch.setattr(world.processes["prefill"].core.pool.lent, "lendable", lambda _: 0)
    world.send("r", prompt(world.rng, 150), 2)
    grant = withhold(world, "r")
    world.send("other", prompt(world.rng, 12), 2)  # the decode worker keeps its pages for `r`
    rest(world)
    deliver(world, grant)
    rest(world)
    assert streams(world).starved == 1 and not world.answers[RequestId("other")].tokens
    world.pass_time(999.0)
    rest(world)
    assert not world.answers[RequestId("r")].done, "a grant for the other may be on its way"
    world.pass_time(1.0)
    world.settle()
    failed = world.answers[RequestId("r")].failed
    assert failed is not None and (failed.code, failed.retryable) == ("busy", True)
    assert world.answers[RequestId("other")].finish == "length"
    assert_settled(world)


def test_who_shares_its_beginning_does_not_wait_for_it() -> None:
    world = tight(caching=1, prefill_pages=12 * LAYERS)
    tokens = prompt(world.rng, 50)
    world.send("r", tokens, 2)
    grant = withhold(world, "r")
    world.send("sibling", tokens[:9], 2)
    while world.turn():
        pass
    assert streams(world).prompts_total == 1
    assert world.answers[RequestId("sibling")].finish == "length"
    deliver(world, grant)
    world.settle()
    assert_settled(world)
