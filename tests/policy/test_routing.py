"""Laws of routing: who may take a request at all, and which rule picks whom."""

from dataclasses import replace

import msgspec
import pytest

from common.errors import InvalidRequest
from common.ids import RequestId
from common.policy.estimates import WorkerView
from common.policy.holdings import Held, NoHoldings
from common.policy.routing import NoRoute, Route, Router, reason_not_ready
from common.policy.routing_rules import RULES
from tests.policy.builders import COST, Cached, link, links, peer, prompt, worker

COLD = NoHoldings()
DECODE = worker("decode-0")
APART = Router(local_prefill_tokens=0, fallback=False)
"""Prompts are always computed by prefill or mixed workers."""


def route(router: Router, workers: list[WorkerView], holdings=COLD, turn: int = 0, **changes: object) -> Route:
    found = router.choose(prompt(**changes), workers, holdings, turn)
    assert isinstance(found, Route), found
    return found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "workers",
    [
        [],
        [worker("prefill-0")],
        [worker("decode-0")],
        [worker("kvstore-0")],
        [worker("prefill-0"), worker("decode-0", accepting=False)],
        [worker("prefill-0", accepting=False), worker("decode-0")],
        [worker("prefill-0", model="a"), worker("decode-0", model="b")],
        [worker("mixed-0", accepting=False)],
    ],
)
def test_without_a_ready_pair_or_mixed_worker_there_is_a_reason(rule: str, workers: list[WorkerView]) -> None:
    found = replace(APART, prefill=rule, decode=rule).choose(prompt(), workers, COLD, 0)
    assert isinstance(found, NoRoute)
    assert found.reason == reason_not_ready(workers, fallback=False) != ""


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("turn", range(6))
def test_kv_flows_only_between_equal_models(rule: str, turn: int) -> None:
    workers = [worker(f"{role}-{m}", model=m) for role in ("prefill", "decode") for m in ("a", "b", "c")]
    found = route(replace(APART, prefill=rule, decode=rule), workers, turn=turn, request=RequestId(f"r{turn}"))
    assert found.decode is not None
    assert found.entry.split("-")[1] == found.decode.split("-")[1]


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_the_views_does_not_matter(rule: str) -> None:
    workers = [worker(f"{role}-{n}") for role in ("prefill", "decode", "mixed") for n in range(3)]
    router = replace(APART, prefill=rule, decode=rule)
    for turn in range(20):
        one = route(router, workers, turn=turn, request=RequestId(f"r{turn}"), session=f"s{turn}")
        other = route(router, workers[::-1], turn=turn, request=RequestId(f"r{turn}"), session=f"s{turn}")
        assert (one.entry, one.decode) == (other.entry, other.decode)


@pytest.mark.long
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n_workers", [3, 7])
def test_cold_requests_of_idle_workers_are_spread_evenly(rule: str, n_workers: int) -> None:
    workers = [worker(f"{role}-{n}") for role in ("prefill", "decode") for n in range(n_workers)]
    router = replace(APART, prefill=rule, decode=rule)
    routes = [route(router, workers, turn=n, request=RequestId(f"r{n}"), session=f"s{n}") for n in range(1200)]
    for picked in ([r.entry for r in routes], [r.decode for r in routes]):
        assert max(picked.count(name) for name in set(picked)) < 1.25 * 1200 / n_workers


def test_round_robin_visits_every_entry_and_every_decode_worker_equally() -> None:
    workers = [worker(f"prefill-{n}") for n in range(4)] + [worker(f"decode-{n}") for n in range(2)]
    router = replace(APART, prefill="round-robin", decode="round-robin")
    routes = [route(router, workers, turn=turn) for turn in range(8)]
    assert [one.entry for one in routes] == [f"prefill-{n % 4}" for n in range(8)]
    assert [one.decode for one in routes] == [f"decode-{n % 2}" for n in range(8)]


def test_a_mixed_worker_answers_alone() -> None:
    found = route(APART, [worker("mixed-0")])
    assert (found.entry, found.decode, found.local) == ("mixed-0", None, None)


def test_least_load_counts_predicted_time_then_requests() -> None:
    workers = [
        worker("prefill-0", queued_ms=900.0),
        worker("prefill-1", queued_ms=100.0, requests=2),
        worker("prefill-2", queued_ms=100.0, requests=1),
        worker("decode-0", requests=50),
        worker("decode-1", requests=4),
    ]
    router = replace(APART, prefill="least-load", decode="least-load")
    found = route(router, workers)
    assert (found.entry, found.decode) == ("prefill-2", "decode-1")
    idle = replace(workers[0], queued_ms=0.0)
    assert route(router, [idle, *workers[1:]]).entry == "prefill-0"


def test_a_cached_prefix_is_worth_exactly_its_computing() -> None:
    """MemServe, eq. 1: the holder wins until its queue is as long as what its cache saves."""
    cached = Cached({"prefill-0": Held(device=32)})  # 512 tokens, 512 ms
    holder, idle, decode = worker("prefill-0", queued_ms=400.0), worker("prefill-1"), worker("decode-0")
    found = route(APART, [holder, idle, decode], cached)
    assert found.entry == "prefill-0" and found.estimate is not None
    assert found.estimate.total_ms == pytest.approx(400.0 + 1000 - 512)
    assert found.estimate.hit_tokens == 512
    assert route(APART, [replace(holder, queued_ms=600.0), idle, decode], cached).entry == "prefill-1"


def test_where_prompts_wait_everywhere_work_that_is_added_counts_for_each_of_them() -> None:
    """512 ms saved are worth 1,536 ms of the holder's queue if two prompts wait on everybody."""
    cached = Cached({"prefill-0": Held(device=32)})

    def entry(queued_ms: float, waiting_elsewhere: float) -> str:
        holder = worker("prefill-0", queued_ms=queued_ms, waiting=9.0)
        other = worker("prefill-1", queued_ms=1000.0, waiting=waiting_elsewhere)
        return route(APART, [holder, other, worker("decode-0")], cached).entry

    assert (entry(2300.0, 2.0), entry(2800.0, 2.0)) == ("prefill-0", "prefill-1")
    assert (entry(1400.0, 0.0), entry(1700.0, 0.0)) == ("prefill-0", "prefill-1"), "one idle worker: eq. 1"


def test_what_is_pushed_out_of_a_full_cache_counts_as_work() -> None:
    cached = Cached({"prefill-0": Held(device=32)})

    def entry(queued_ms: float, spare_tokens: int | None) -> str:
        workers = [worker(f"prefill-{n}", spare_tokens=spare_tokens) for n in range(2)]
        return route(APART, [replace(workers[0], queued_ms=queued_ms), workers[1], worker("decode-0")], cached).entry

    assert (entry(900.0, 0), entry(1200.0, 0)) == ("prefill-0", "prefill-1")
    assert (entry(600.0, 1000), entry(600.0, None)) == ("prefill-1", "prefill-1")


def test_a_full_hit_still_computes_the_last_token() -> None:
    cached = Cached({"prefill-0": Held(device=4)})
    found = route(APART, [worker("prefill-0"), worker("decode-0")], cached, tokens=64)
    assert found.estimate is not None
    assert found.estimate.hit_tokens == 48


def test_a_session_stays_where_it_is_until_the_gate_shuts() -> None:
    workers = [worker(f"prefill-{n}") for n in range(4)] + [worker("decode-0")]
    router = replace(APART, prefill="session", gate=1.0)
    home = {route(router, workers, session="s", request=RequestId(f"r{n}")).entry for n in range(20)}
    assert len(home) == 1
    busy = [replace(w, queued_ms=900.0) if w.id in home else w for w in workers]
    assert route(router, busy, session="s").entry in home, "less than twice as loaded"
    busier = [replace(w, queued_ms=1100.0) if w.id in home else w for w in workers]
    found = route(router, busier, session="s")
    assert found.entry not in home
    assert found.entry_choice is not None and found.entry_choice.gated == 1


def test_a_worker_that_leaves_moves_only_its_own_sessions() -> None:
    workers = [worker(f"prefill-{n}") for n in range(5)] + [worker("decode-0")]
    router = replace(APART, prefill="session")
    sessions = [f"s{n}" for n in range(100)]
    before = {s: route(router, workers, session=s).entry for s in sessions}
    after = {s: route(router, workers[1:], session=s).entry for s in sessions}
    assert {s for s in sessions if before[s] != after[s]} == {s for s in sessions if before[s] == "prefill-0"}


def test_the_longest_prefix_wins_until_the_gate_shuts() -> None:
    cached = Cached({"prefill-0": Held(device=10), "prefill-1": Held(device=20)})
    workers = [worker("prefill-0"), worker("prefill-1", queued_ms=1500.0), worker("decode-0")]
    open_gate, shut_gate = replace(APART, prefill="longest-prefix", gate=2.0), replace(APART, prefill="longest-prefix")
    assert route(open_gate, workers, cached).entry == "prefill-1"
    assert route(shut_gate, workers, cached).entry == "prefill-0"
    assert route(replace(open_gate, gate=0.0), workers, COLD).entry == "prefill-0"


def test_blocks_in_host_memory_count_by_what_fetching_them_leaves_of_the_gain() -> None:
    """200 tokens that take half their computing time to fetch are worth 100 on the device."""
    slow = links(link("kvstore-0", bytes_per_ms=200.0, tier="host"))  # 100 bytes a token: half a millisecond each
    cached = Cached({"prefill-0": Held(device=0, host=20), "prefill-1": Held(device=11)})
    workers = [
        worker("prefill-0", store=peer("kvstore-0"), links=slow),
        worker("prefill-1"),
        worker("decode-0"),
    ]
    assert route(replace(APART, prefill="longest-prefix", gate=9.0), workers, cached).entry == "prefill-1"
    quick = links(link("kvstore-0", tier="host"))
    fast = [replace(workers[0], links=quick), *workers[1:]]
    assert route(replace(APART, prefill="longest-prefix", gate=9.0), fast, cached).entry == "prefill-0"


def test_what_is_dearer_to_fetch_than_to_compute_does_not_count() -> None:
    crawling = links(link("kvstore-0", bytes_per_ms=10.0, tier="host"))
    cached = Cached({"prefill-0": Held(device=2, host=20)})
    found = route(APART, [worker("prefill-0", store=peer("kvstore-0"), links=crawling), worker("decode-0")], cached)
    assert found.estimate is not None
    assert (found.estimate.hit_tokens, found.estimate.own_ms) == (32, pytest.approx(1000 - 32))


def test_a_prefix_is_fetched_from_a_peer_exactly_when_that_is_faster() -> None:
    """MemServe, eq. 2."""
    cached = Cached({"prefill-0": Held(device=40), "prefill-1": Held(device=10)})

    def with_link(bytes_per_ms: float, queued_bytes: int = 0) -> Route:
        way = link("prefill-0", bytes_per_ms=bytes_per_ms)
        way = type(way)(way.peer, way.tier, way.bytes_per_s, way.delay_ms, queued_bytes)
        busy, idle = worker("prefill-0", queued_ms=5000.0), worker("prefill-1", links=links(way))
        return route(APART, [busy, idle, worker("decode-0")], cached)

    fast = with_link(101.0)  # 30 blocks of 1,600 bytes: 475 ms for 480 ms of computing
    assert fast.entry == "prefill-1" and fast.estimate is not None and fast.estimate.fetch is not None
    assert (fast.estimate.fetch.holder, fast.estimate.fetch.n_blocks) == (peer("prefill-0"), 40)
    assert fast.estimate.fetch.fetch_ms <= fast.estimate.fetch.saved_ms == pytest.approx(480)
    slow, queued = with_link(99.0), with_link(101.0, queued_bytes=1000)
    assert slow.estimate is not None and slow.estimate.fetch is None
    assert queued.estimate is not None and queued.estimate.fetch is None, "what is queued comes first"


def test_a_draining_worker_is_not_chosen_but_its_kv_is_fetched() -> None:
    cached = Cached({"prefill-0": Held(device=40)})
    draining = worker("prefill-0", accepting=False)
    found = route(APART, [draining, worker("prefill-1", links=links(link("prefill-0"))), worker("decode-0")], cached)
    assert found.entry == "prefill-1" and found.estimate is not None
    assert found.estimate.fetch is not None and found.estimate.fetch.holder == peer("prefill-0")


def test_predictions_that_are_as_good_as_equal_do_not_pin_everything_to_one_worker() -> None:
    fitted = [msgspec.structs.replace(COST, token_ms=1.0 + n / 500) for n in range(4)]
    workers = [worker(f"prefill-{n}", cost=cost) for n, cost in enumerate(fitted)] + [worker("decode-0")]
    picked = {route(APART, workers, request=RequestId(f"r{n}")).entry for n in range(100)}
    assert len(picked) == 4


def test_decode_is_chosen_by_load_not_by_its_prefix_unless_sending_is_dear() -> None:
    cached = Cached({"decode-0": Held(device=60)})
    fast = links(link("decode-0"), link("decode-1"))
    workers = [worker("prefill-0", links=fast), worker("decode-0", requests=20), worker("decode-1")]
    assert route(APART, workers, cached, max_tokens=64).decode == "decode-1"
    slow = links(link("decode-0", bytes_per_ms=10.0), link("decode-1", bytes_per_ms=10.0))
    dear = [replace(workers[0], links=slow), *workers[1:]]
    assert route(APART, dear, cached, max_tokens=64).decode == "decode-0"


def test_a_decode_worker_without_room_waits_for_its_turnover() -> None:
    full = worker("decode-0", requests=4, kv_tokens=4000, free_tokens=0)
    assert route(APART, [worker("prefill-0"), full, worker("decode-1", requests=8)]).decode == "decode-1"


def test_a_decode_worker_computes_what_little_it_lacks() -> None:
    cached = Cached({"decode-1": Held(device=62)})  # 992 of 1,000 tokens
    workers = [worker("prefill-0"), worker("decode-0"), worker("decode-1")]
    found = route(Router(local_prefill_tokens=16), workers, cached)
    assert (found.entry, found.decode, found.local) == ("decode-1", None, "few-uncached")
    assert route(Router(local_prefill_tokens=7), workers, cached).local is None
    assert route(Router(local_prefill_tokens=0), workers, cached).local is None
    assert route(Router(local_prefill_tokens=16), workers, COLD, tokens=16).local == "few-uncached"
    asked = route(Router(local_prefill_tokens=16), workers, cached, prefill_rule="round-robin")
    assert asked.entry == "prefill-0", "a rule that was asked for by name is not passed over"


def test_what_a_decode_worker_is_only_expected_to_hold_does_not_draw_siblings_to_it() -> None:
    class Expected(Cached):
        def device_run(self, peer):
            return 0

    expected = Expected({"decode-1": Held(device=62)})
    workers = [worker("prefill-0"), worker("decode-0"), worker("decode-1")]
    assert route(Router(local_prefill_tokens=16), workers, expected).local is None


def test_a_busy_decode_worker_is_spared_even_what_little_it_lacks() -> None:
    cached = Cached({"decode-1": Held(device=62)})
    busy = worker("decode-1", requests=64, queued_ms=20_000.0)
    workers = [worker("prefill-0"), worker("decode-0"), busy]
    found = route(Router(local_prefill_tokens=16), workers, cached, max_tokens=64)
    assert (found.local, found.decode) == (None, "decode-0")


def test_who_computes_a_prompt_alone_computes_its_last_token() -> None:
    cached = Cached({"decode-0": Held(device=3)})
    found = route(Router(fallback=True), [worker("decode-0")], cached, tokens=48)
    assert found.estimate is not None and found.estimate.hit_tokens == 32


def test_without_prefill_workers_decode_workers_compute_only_if_they_may() -> None:
    workers = [worker("prefill-0", accepting=False), worker("decode-0")]
    found = route(Router(fallback=True), workers)
    assert (found.entry, found.decode, found.local) == ("decode-0", None, "no-prefill-worker")
    assert isinstance(Router(fallback=False).choose(prompt(), workers, COLD, 0), NoRoute)
    assert reason_not_ready(workers, fallback=True) is None
    assert reason_not_ready(workers, fallback=False) is not None


def test_a_client_may_name_the_rule_or_the_worker() -> None:
    workers = [worker(f"prefill-{n}") for n in range(3)] + [worker("decode-0"), worker("decode-1")]
    found = route(APART, workers, prefill_rule="worker=prefill-2", decode_rule="worker=decode-1")
    assert (found.entry, found.decode) == ("prefill-2", "decode-1")
    drained = [replace(w, accepting=w.id != "prefill-2") for w in workers]
    missing = APART.choose(prompt(prefill_rule="worker=prefill-2"), drained, COLD, 0)
    assert isinstance(missing, NoRoute) and "worker=prefill-2" in missing.reason
    with pytest.raises(InvalidRequest, match="no such worker is here for prefill; there are prefill-0"):
        APART.choose(prompt(prefill_rule="worker=prefill-9"), workers, COLD, 0)
    with pytest.raises(InvalidRequest, match="for prefill") as refused:
        APART.choose(prompt(prefill_rule="worker=decode-0"), workers, COLD, 0)
    assert refused.value.param == "x-penstock-route-prefill"
    with pytest.raises(InvalidRequest, match="predicted-time"):
        APART.choose(prompt(decode_rule="best"), workers, COLD, 0)


def test_without_prefill_workers_the_decode_worker_that_would_be_done_first_computes() -> None:
    workers = [worker("decode-0", queued_ms=500.0), worker("decode-1", requests=9)]
    assert route(Router(), workers).entry == "decode-1"
    cached = Cached({"decode-0": Held(device=40)})
    assert route(Router(), workers, cached).entry == "decode-0", "640 ms saved, 500 ms queued"


def test_nothing_is_fetched_where_that_is_switched_off_or_no_way_leads() -> None:
    cached = Cached({"prefill-0": Held(device=40)})
    workers = [worker("prefill-0", queued_ms=5000.0), worker("prefill-1", links=links(link("prefill-0"))), DECODE]

    def fetches(router: Router, workers: list[WorkerView]) -> bool:
        found = route(router, workers, cached)
        return found.estimate is not None and found.estimate.fetch is not None

    assert fetches(APART, workers)
    assert not fetches(replace(APART, peer_fetch=False), workers)
    assert not fetches(APART, [workers[0], worker("prefill-1"), DECODE])


def test_the_longest_run_is_fetched_and_only_what_lies_beyond_ones_own() -> None:
    cached = Cached({"prefill-0": Held(device=30), "prefill-1": Held(device=50), "prefill-2": Held(device=10)})
    ways = links(link("prefill-0", bytes_per_ms=200.0), link("prefill-1", bytes_per_ms=200.0))
    busy = [worker(f"prefill-{n}", queued_ms=9000.0) for n in (0, 1)]
    found = route(APART, [*busy, worker("prefill-2", links=ways), DECODE], cached)
    assert found.estimate is not None and found.estimate.fetch is not None
    assert (found.estimate.fetch.holder, found.estimate.fetch.n_blocks) == (peer("prefill-1"), 50)
    assert found.estimate.fetch.fetch_ms == pytest.approx(40 * 16 * 100 / 200.0)
    assert found.estimate.own_ms == pytest.approx(1000 - 800 + 320)


def test_an_answer_of_unknown_length_is_guessed_but_never_longer_than_it_may_be() -> None:
    def own_ms(max_tokens: int) -> float:
        choice = route(
            APART, [worker("prefill-0"), worker("decode-0", requests=1)], max_tokens=max_tokens
        ).decode_choice
        assert choice is not None
        return choice.chosen.own_ms

    assert [own_ms(max_tokens) for max_tokens in (1, 10, 64, 4096)] == [2.0, 20.0, 128.0, 128.0]


def test_what_a_full_decode_worker_holds_of_the_prompt_needs_no_room() -> None:
    full = worker("decode-0", kv_tokens=4000, free_tokens=200)

    def wait_ms(held_blocks: int) -> float:
        choice = route(APART, [worker("prefill-0"), full], Cached({"decode-0": Held(device=held_blocks)})).decode_choice
        assert choice is not None
        return choice.chosen.queued_ms

    assert wait_ms(50) == 0.0
    assert wait_ms(0) == pytest.approx(64 * 800 / 4000), "a fifth of what is there must turn over"


def test_the_gate_compares_loads_as_if_nothing_were_cached() -> None:
    """Else who holds much would look idle, and draw everything until it drowns."""
    cached = Cached({"prefill-0": Held(device=60)})
    workers = [worker("prefill-0", queued_ms=1200.0), worker("prefill-1"), DECODE]
    assert route(replace(APART, prefill="longest-prefix", gate=1.0), workers, cached).entry == "prefill-1"


def test_nearly_the_longest_prefix_on_an_idle_worker_is_as_good() -> None:
    cached = Cached({"prefill-0": Held(device=60), "prefill-1": Held(device=58)})
    workers = [worker("prefill-0", queued_ms=900.0), worker("prefill-1"), DECODE]
    assert route(replace(APART, prefill="longest-prefix"), workers, cached).entry == "prefill-1"


def test_among_equally_fast_workers_the_holder_is_taken_then_who_has_fewer_requests() -> None:
    holder, idle = worker("prefill-0", queued_ms=512.0, requests=9), worker("prefill-1")
    cached = Cached({"prefill-0": Held(device=32)})
    assert {route(APART, [holder, idle, DECODE], cached, request=RequestId(f"r{n}")).entry for n in range(9)} == {
        "prefill-0"
    }
    cold = [replace(holder, queued_ms=0.0), idle, DECODE]
    for rule in ("predicted-time", "least-load"):
        router = replace(APART, prefill=rule)
        assert {route(router, cold, request=RequestId(f"r{n}")).entry for n in range(9)} == {"prefill-1"}


@pytest.mark.parametrize("rule", RULES)
def test_who_does_not_accept_gets_nothing_however_idle_it_is(rule: str) -> None:
    busy = [worker(f"{role}-0", queued_ms=900.0, requests=9) for role in ("prefill", "decode", "mixed")]
    idle = [worker(f"{role}-{n}", accepting=False) for role in ("prefill", "decode", "mixed") for n in (1, 2)]
    holdings = Cached({one.id: Held(device=62) for one in idle})
    for turn in range(6):
        router = Router(prefill=rule, decode=rule, peer_fetch=False)
        found = route(router, [*busy, *idle], holdings, turn=turn, request=RequestId(f"r{turn}"))
        assert {found.entry, found.decode} <= {one.id for one in busy} | {None}
        assert route(router, [busy[1], *idle], holdings, turn=turn).entry == "decode-0"


def test_a_shorter_prefix_is_not_fetched_however_slow_the_way_to_it_is() -> None:
    cached = Cached({"prefill-0": Held(device=20), "prefill-1": Held(device=40)})
    crawling = links(link("prefill-0", bytes_per_ms=1.0))
    found = route(APART, [worker("prefill-0", queued_ms=9e9), worker("prefill-1", links=crawling), DECODE], cached)
    assert found.estimate is not None
    assert (found.estimate.fetch, found.estimate.hit_tokens) == (None, 640)


def test_what_sending_to_a_decode_worker_costs_does_not_shut_its_gate() -> None:
    decodes = [worker(f"decode-{n}") for n in range(3)]
    router = replace(APART, decode="session")
    home = route(router, [worker("prefill-0"), *decodes], session="s").decode
    assert home is not None
    slow = worker("prefill-0", links=links(link(home, bytes_per_ms=1.0)))
    assert route(router, [slow, *decodes], session="s").decode == home


def test_every_tier_costs_its_fetching_and_is_worth_what_that_leaves() -> None:
    """160 tokens each on the device, in memory at half a millisecond a token and on disk at 0.8."""
    ways = links(
        link("kvstore-0", bytes_per_ms=200.0, tier="host"),
        link("kvstore-0", bytes_per_ms=125.0, tier="disk"),
        link("prefill-1"),
    )
    cached = Cached({"prefill-0": Held(device=10, host=10, disk=10)})
    found = route(APART, [worker("prefill-0", store=peer("kvstore-0"), links=ways), DECODE], cached)
    assert found.estimate is not None
    assert found.estimate.hit_tokens == 480
    assert found.estimate.own_ms == pytest.approx(1000 - 480 + 160 * 0.5 + 160 * 0.8)
    assert found.estimate.worth_tokens == pytest.approx(160 + 160 * 0.5 + 160 * 0.2)
    longer = Cached({**cached.by_worker, "prefill-1": Held(device=50)})
    busy = worker("prefill-1", queued_ms=9e9)
    found = route(APART, [worker("prefill-0", store=peer("kvstore-0"), links=ways), busy, DECODE], longer)
    assert found.estimate is not None and found.estimate.fetch is not None
    assert found.estimate.fetch.saved_ms == pytest.approx(40 * 16), "computing of all that its own device lacks"


def test_without_a_session_the_session_rule_goes_by_load() -> None:
    workers = [*[worker(f"prefill-{n}") for n in range(3)], worker("prefill-3", queued_ms=900.0), DECODE]
    router = replace(APART, prefill="session")
    picked = {route(router, workers, request=RequestId(f"r{n}")).entry for n in range(30)}
    assert picked == {"prefill-0", "prefill-1", "prefill-2"}
