"""Blocks fetched from another worker's device pool: tokens never change, wrong hints cost a recomputation, nothing stays."""

import random

import pytest

from common.block_hash import hash_blocks, root_hash
from common.ids import PeerId, RequestId
from common.messages.blocks import Find, Found
from common.messages.requests import FetchHint, Sampling
from kvstore.server.core import reads
from services.worker.core import lender
from tests.services.worker.core.test_caching import SPILLS, check_end, conversation
from tests.support.fake_engine import answer
from tests.support.world import GATEWAY, World
from tests.support.world_process import MODEL

PROMPT = [(at * 11) % 900 + 3 for at in range(41)]
N_BLOCKS = 10
WORKERS = ("prefill", "prefill-1", "decode", "mixed", "mixed-1")


def world(*, transport: str = "shm", pages: int = 200, **settings: object) -> World:
    made = World(
        random.Random(5),
        prefill_pages=pages,
        decode_pages=200,
        transport=transport,
        more=("prefill-1", "mixed", "mixed-1"),
        **{"caching": 2, **settings},  # type: ignore[arg-type]  # a test's keywords
    )
    made.greet()
    return made


def hint(target: World, holder: str, n_blocks: int = N_BLOCKS) -> FetchHint:
    return FetchHint(holder=target.processes[holder].peer, n_blocks=n_blocks)


def cached_by(target: World, to: str, name: str = "r", **more: object) -> int:
    """Ask, and be answered rightly; the cached tokens."""
    target.send(name, PROMPT, 3, to=to, **more)
    target.settle()
    seen = target.answers[RequestId(name)]
    assert seen.tokens == answer(PROMPT, 3)
    cached = seen.deltas[0].cached_tokens
    assert cached is not None
    return cached


def counters(target: World, name: str) -> dict[str, float]:
    return target.processes[name].core.report(0, target.now_ms).counters


def until_sent(target: World, source: str, holder: str, kind: type) -> None:
    link = target.processes[source].peer, target.processes[holder].peer
    while not any(isinstance(message, kind) for message, _ in target.links.get(link, ())):
        assert target.turn(), f"no {kind.__name__} was sent"


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize(
    ("holder", "to"),
    [("prefill-1", "prefill"), ("decode", "prefill"), ("mixed-1", "mixed"), ("prefill", "decode")],
)
def test_what_another_worker_holds_is_fetched_and_counted(holder: str, to: str, transport: str) -> None:
    """The decode worker has the whole prompt after a hand-over; it asks prefill workers by message."""
    target = world(transport=transport)
    made_by = "prefill-1" if holder == "decode" else holder
    salt = {"cache_salt": "s"}
    target.send("first", PROMPT, 3, to=made_by, **salt)
    target.settle()
    if to == "decode":  # it holds the prompt too: make it forget
        pool = target.processes["decode"].core.pool
        pool.evict(N_BLOCKS + 1)
    assert cached_by(target, to, fetch=hint(target, holder), **salt) == 40
    totals = counters(target, to)
    assert totals["hit_tokens_total{tier=peer}"] == 40
    assert totals["kv_bytes_total{direction=peer_to_device}"] == 40 * 2 * 8 * 2 * 4
    assert totals["kv_bytes_total{direction=host_to_device}"] == totals["fetch_hints_wrong_total"] == 0
    (link,) = target.processes[to].core.report(0, target.now_ms).links
    assert (link.peer, link.tier, link.queued_bytes) == (target.processes[holder].peer, "device", 0)
    check_end(target)


def test_only_what_is_missing_here_is_asked_for() -> None:
    target = world()
    cached_by(target, "prefill-1", "theirs")
    target.send("mine", PROMPT[:17], 1)
    target.settle()
    target.send("r", PROMPT, 3, fetch=hint(target, "prefill-1", 8))
    until_sent(target, "prefill", "prefill-1", Find)
    link = target.links[target.processes["prefill"].peer, target.processes["prefill-1"].peer]
    (find,) = [message for message, _ in link if isinstance(message, Find)]
    assert list(find.blocks) == hash_blocks(PROMPT, root_hash(MODEL), 4)[4:8]
    target.settle()
    assert target.answers[RequestId("r")].deltas[0].cached_tokens == 32


@pytest.mark.parametrize("holder", ["prefill", "nobody@1", "kvstore", "gateway@1"])
def test_a_holder_that_cannot_be_asked_leaves_the_kv_store(holder: str) -> None:
    """Oneself, somebody unknown, the store itself, a gateway."""
    target = world(store_blocks=100)
    cached_by(target, "prefill-1", "theirs")
    peers = {"prefill": target.processes["prefill"].peer, "kvstore": target.store.peer}
    wrong = FetchHint(holder=peers.get(holder, PeerId(holder)), n_blocks=N_BLOCKS)
    assert cached_by(target, "prefill", fetch=wrong) == 40
    totals = counters(target, "prefill")
    assert totals["hit_tokens_total{tier=host}"] == 40
    assert (totals["fetch_hints_total"], totals["fetch_hints_wrong_total"]) == (1, 1)
    ways = {t.peer for t in target.processes["prefill"].core.report(0, 0.0).transports}
    assert ways == {target.processes[name].peer for name in ("prefill-1", "decode")} | {target.store.peer}
    check_end(target)


@pytest.mark.parametrize("store_blocks", [0, 100])
@pytest.mark.parametrize("lease_ms", [0, 5_000, 5_050])
def test_a_holder_that_keeps_blocks_for_a_moment_only_does_not_keep_the_prompt_waiting(
    lease_ms: int, store_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is stale as soon as it is found would be looked up for ever."""
    monkeypatch.setattr(lender, "_LONGEST_LEASE_MS", lease_ms)
    monkeypatch.setattr(reads, "MAX_LEASE_MS", lease_ms)
    target = world(store_blocks=store_blocks)
    cached_by(target, "prefill-1", "theirs")
    assert cached_by(target, "prefill", fetch=hint(target, "prefill-1")) == 0
    check_end(target)


@pytest.mark.parametrize("store_blocks", [0, 100])
def test_a_holder_that_has_less_is_used_only_if_the_kv_store_has_no_more(store_blocks: int) -> None:
    target = world(store_blocks=store_blocks)
    cached_by(target, "prefill-1", "theirs")
    target.processes["prefill-1"].core.pool.evict(4)
    reused, tier = (40, "host") if store_blocks else (24, "peer")
    assert cached_by(target, "prefill", fetch=hint(target, "prefill-1")) == reused
    totals = counters(target, "prefill")
    assert totals[f"hit_tokens_total{{tier={tier}}}"] == reused
    assert totals["fetch_hints_wrong_total"] == 1
    check_end(target)


def asking_the_store(target: World) -> World:
    """The holder has answered less than was said and keeps that for us; the store has not answered yet."""
    cached_by(target, "prefill-1", "theirs")
    target.processes["prefill-1"].core.pool.evict(4)
    target.send("r", PROMPT, 3, fetch=hint(target, "prefill-1"))
    link = target.processes["prefill"].peer, target.store.peer
    while not any(isinstance(message, Find) for message, _ in target.links.get(link, ())):
        assert target.turn()
    assert target.processes["prefill-1"].core.pool.cache.n_pinned == 6
    return target


@pytest.mark.parametrize("ended_by", ["better", "cancel"])
def test_what_is_not_used_is_given_back_at_once(ended_by: str) -> None:
    target = asking_the_store(world(store_blocks=100))
    if ended_by == "cancel":
        target.cancel(RequestId("r"))
    while target.turn():
        pass
    assert target.processes["prefill-1"].core.pool.cache.n_pinned == 0
    target.settle()
    check_end(target)


def test_what_a_holder_kept_is_no_use_when_it_dies_while_the_store_is_asked() -> None:
    target = asking_the_store(world(store_blocks=100))
    holder, store = target.processes["prefill-1"], target.store
    holder.alive = False
    target.bury(holder.peer)
    target.kill_store()
    target.settle()
    assert store is not None and target.answers[RequestId("r")].tokens == answer(PROMPT, 3)
    assert counters(target, "prefill")["load_failures_total"] == 0
    check_end(target)


@pytest.mark.parametrize("n_blocks", [-3, 0, 1, 10**9])
def test_a_hint_with_a_count_that_cannot_be_breaks_nothing(n_blocks: int) -> None:
    target = world()
    cached_by(target, "prefill-1", "theirs")
    expected = 40 if n_blocks > 10 else 0
    assert cached_by(target, "prefill", fetch=hint(target, "prefill-1", n_blocks)) == expected
    check_end(target)


@pytest.mark.parametrize("moment", [Find, Found, "copy"])
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_holder_that_dies_in_between_harms_nobody(transport: str, moment: type | str) -> None:
    target = world(transport=transport, store_blocks=100)
    cached_by(target, "prefill-1", "theirs")
    target.store_blocks = 0
    target.kill_store()
    target.send("r", PROMPT, 3, fetch=hint(target, "prefill-1"))
    until_sent(target, "prefill", "prefill-1", Find)
    prefill = target.processes["prefill"]
    if moment is Found:
        until_sent(target, "prefill-1", "prefill", Found)
    elif moment == "copy":
        while not (prefill.moves or prefill.core.pool.ledger.counts().reserved):
            assert target.turn()
    holder = target.processes["prefill-1"]
    holder.alive = False
    target.bury(holder.peer)
    target.settle()
    assert target.answers[RequestId("r")].tokens == answer(PROMPT, 3)
    check_end(target)


def test_a_holder_that_does_not_answer_is_waited_for_no_longer_than_a_second() -> None:
    target = world(store_blocks=100)
    cached_by(target, "prefill-1", "theirs")
    holder = target.processes["prefill-1"]
    hear = holder.core.on_message
    holder.core.on_message = lambda p, m, now: [] if isinstance(m, Find) else hear(p, m, now)
    target.send("r", PROMPT, 3, fetch=hint(target, "prefill-1"))
    while target.turn():
        pass
    assert target.answers[RequestId("r")].tokens == []
    target.pass_time(1_001.0)
    while target.turn():
        pass
    assert target.answers[RequestId("r")].deltas[0].cached_tokens == 40, "the KV store was asked then"
    totals = counters(target, "prefill")
    assert (totals["hit_tokens_total{tier=host}"], totals["fetch_hints_wrong_total"]) == (40, 1)


def test_what_a_worker_found_and_could_not_use_in_time_is_not_asked_for_again() -> None:
    """Two workers whose prompts wait for pages that the other's prompt has pinned would else wait for ever."""
    target = world()
    cached_by(target, "prefill-1", "theirs")
    prefill = target.processes["prefill"]
    prefill.core._queue._preparation.has_room = lambda prompt: False  # what the other pins
    target.send("r", PROMPT, 3, fetch=hint(target, "prefill-1"))
    while target.turn():
        pass
    holder = target.processes["prefill-1"].core.pool
    assert holder.cache.n_pinned == N_BLOCKS
    for _ in range(13):
        target.pass_time(400.0)
        while target.turn():
            pass
    assert prefill.core._neighbours.link(target.processes["prefill-1"].peer) is not None
    assert holder.cache.n_pinned == 0
    del prefill.core._queue._preparation.has_room
    target.settle()
    check_end(target)


def test_a_worker_that_keeps_nothing_fetches_nothing() -> None:
    target = world(caching=0)
    assert cached_by(target, "prefill", fetch=hint(target, "prefill-1")) == 0
    assert target.processes["prefill-1"].peer not in {
        t.peer for t in target.processes["prefill"].core.report(0, 0.0).transports
    }


def test_a_prompt_for_a_worker_that_does_not_decode_fails_by_name() -> None:
    """Prefill workers are neighbours now; nobody may hand a prompt over to one."""
    target = world()
    request = target.generate("x", PROMPT, Sampling(max_tokens=2), decode="prefill-1")
    target.post(GATEWAY, target.processes["prefill"].peer, request)
    target.settle()
    for _ in range(8):
        target.pass_time(400.0)
        while target.turn():
            pass
    failed = target.answers[RequestId("x")].failed
    assert failed is not None and failed.code == "no_worker" and "prefill worker" in failed.text


@pytest.mark.parametrize("seed", range(30))
def test_whatever_the_hints_say_the_tokens_are_those_of_the_prompt(seed: int) -> None:
    """Right ones, holders that evicted, holders that died, counts too high; caching, KV store, deaths and cancels beside it."""
    rng = random.Random(seed)
    target = World(
        rng,
        prefill_pages=rng.choice([28, 34, 120]),
        decode_pages=rng.choice([40, 60, 140]),
        transport=rng.choice(["shm", "tcp"]),
        store_blocks=rng.choice([0, 0, 12, 200]),
        flaky=rng.choice([0.0, 0.0, 0.2]),
        more=("prefill-1", "mixed", "mixed-1"),
        caching=rng.choice([1, 2, 3]),
        spill=rng.choice(SPILLS),
        transfer=rng.choice(["layer", "request", "aggregated", "auto"]),
        ahead=seed % 2 == 1,
    )
    target.greet()
    prefixes = [[rng.randrange(3, 900) for _ in range(n)] for n in (17, 24, 30, 33)]
    dead = [PeerId("prefill-1@9999")]
    history: list[int] = []
    for number in range(rng.randrange(8, 20)):
        prompt = conversation(rng, history, prefixes)[:44]
        holders = [*(target.processes[name].peer for name in WORKERS), *dead]
        fetch = FetchHint(holder=rng.choice(holders), n_blocks=rng.randrange(12)) if rng.random() < 0.8 else None
        target.send(f"r{number}", prompt, rng.randrange(1, 8), to=rng.choice(WORKERS), fetch=fetch)
        for _ in range(rng.randrange(0, 120)):
            target.turn()
        if rng.random() < 0.1:
            target.cancel(RequestId(f"r{rng.randrange(number + 1)}"))
        if rng.random() < 0.1:
            target.pass_time(rng.choice([100.0, 1_100.0, 6_000.0, 11_000.0]))
        if rng.random() < 0.15:
            target.processes[rng.choice(WORKERS)].core.pool.evict(rng.randrange(12))
        if rng.random() < 0.05:
            name = rng.choice(WORKERS)
            dead.append(target.processes[name].peer)
            target.kill(name)
            target.start(name)
            target.greet()
        if rng.random() < 0.5:
            target.settle()
            seen = target.answers[RequestId(f"r{number}")]
            history = seen.prompt + seen.tokens
    target.settle()
    target.pass_time(20_000.0)
    target.settle()
    check_end(target)
