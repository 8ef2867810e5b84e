"""Laws of routing over time: the benchmarks' experiments, small, with the gateway's own cores and virtual workers."""

import math
import statistics
from collections import Counter
from dataclasses import replace

import pytest

from benchmarks import routing_policies
from benchmarks._traces import (
    Documents,
    Outcome,
    Popular,
    cold_trace,
    document_trace,
    outcome,
    popular_trace,
    quantile,
    sibling_trace,
)
from benchmarks._virtual import Scene, World
from benchmarks.routing_load import SHAPES, WORKERS, busiest, n_computed, scene, shares
from common.policy.routing import Router
from common.policy.routing_rules import RULES

pytestmark = pytest.mark.system  # starts nothing, but simulates for seconds: too long for `make check`
BLOCK_TOKENS = 512
FULL = (16_000, 20.0, 9)
"""More than three workers can compute, unless they find nearly everything in caches that hold a third of it."""


def at_full_caches(seed: int, *, link_bytes_per_s: float | None = None) -> dict[str, Outcome]:
    base = routing_policies.limited(routing_policies.scene(BLOCK_TOKENS, link_bytes_per_s), FULL)
    trace = document_trace(Documents(document_tokens=FULL[0], rate_per_s=FULL[1], requests=200), base.model, seed)
    rules = ("session", "longest-prefix", "predicted-time")
    return {rule: outcome(World(replace(base, router=Router(prefill=rule)), trace).run()) for rule in rules}


@pytest.mark.parametrize("rule", RULES)
def test_cold_requests_load_every_worker_alike(rule: str) -> None:
    one = scene(SHAPES["8 mixed"], Router(prefill=rule))
    served = World(one, cold_trace(2_000, 800.0, (64, 64), one.model, seed=0)).run()
    assert busiest(shares(served, computed_only=False)) < 1.2


def test_predicted_time_is_no_worse_than_keeping_sessions_or_prefixes_together_when_caches_are_full() -> None:
    found = [at_full_caches(seed) for seed in (1, 2)]
    p99_ms = {rule: statistics.mean(one[rule].p99_ms for one in found) for rule in found[0]}
    assert p99_ms["predicted-time"] <= 0.6 * p99_ms["session"]
    assert p99_ms["predicted-time"] <= 1.1 * p99_ms["longest-prefix"]


def test_fetches_from_peers_do_not_push_out_what_others_need() -> None:
    found = at_full_caches(1, link_bytes_per_s=50e9)["predicted-time"]
    without = at_full_caches(1)["predicted-time"]
    assert found.p99_ms <= 1.2 * without.p99_ms
    assert found.hit_share > 0.75


HOT = Popular(n=800, rate_per_s=1.0, prefix_tokens=4_096, tail_tokens=512, other_tokens=2_048)
"""Half of all requests begin with one prefix, which one worker has first; the others share nothing."""


def hot_prefix(router: Router, *, room_tokens: int | None = None) -> tuple[float, list[float], float]:
    """At 80 % load of 8 workers: the busiest worker's computing over the mean; the 95th percentile of waits, in ms, of those
    who came to a worker that serves the prefix, by quarters of the run; and the time of a prompt of the tail."""
    base = scene(SHAPES["8 mixed"], router)
    base = replace(base, capacity_blocks=None if room_tokens is None else room_tokens // base.model.block_tokens)
    exec_ms = base.cost.exec_ms
    hot_ms, tail_ms = exec_ms(HOT.prefix_tokens + HOT.tail_tokens, HOT.prefix_tokens), exec_ms(HOT.other_tokens, 0)
    rate_per_s = 0.8 * WORKERS / (HOT.share * hot_ms + (1 - HOT.share) * tail_ms) * 1e3
    trace, is_hot = popular_trace(replace(HOT, rate_per_s=rate_per_s), base.model, seed=0)
    served = World(base, trace).run()
    own_ms = [exec_ms(one.prompt_tokens, one.cached_tokens) for one in served]
    work_ms = Counter[str]()
    for one, ms in zip(served, own_ms, strict=True):
        work_ms[one.entry] += ms
    holders = {one.entry for one, yes in zip(served, is_hot, strict=True) if yes}
    waits_ms = [[one.ttft_ms - ms] if one.entry in holders else [] for one, ms in zip(served, own_ms, strict=True)]
    step = len(served) // 4
    quarters = [sorted(ms for some in waits_ms[at * step : (at + 1) * step] for ms in some) for at in range(4)]
    return busiest(work_ms), [quantile(one, 0.95) for one in quarters], tail_ms


@pytest.mark.parametrize(
    ("rule", "room_tokens"), [*((rule, None) for rule in RULES), ("longest-prefix", 16_384), ("predicted-time", 16_384)]
)
def test_a_hot_prefix_beside_a_uniform_tail_pins_nobody(rule: str, room_tokens: int | None) -> None:
    """Whoever holds it has no more work than others, and no queue that grows."""
    busiest_share, waits_ms, tail_ms = hot_prefix(Router(prefill=rule), room_tokens=room_tokens)
    assert busiest_share < 1.25
    assert waits_ms[3] <= 1.5 * waits_ms[1] + tail_ms, waits_ms


def test_without_the_gate_the_holder_of_a_hot_prefix_drowns() -> None:
    """So the law above has a reason."""
    busiest_share, waits_ms, tail_ms = hot_prefix(Router(prefill="longest-prefix", gate=math.inf))
    assert busiest_share > 1.5
    assert waits_ms[3] > 1.5 * waits_ms[1] + tail_ms, waits_ms


def siblings(*, expectations: bool) -> int:
    base = scene(SHAPES["8 mixed"], Router())
    one: Scene = replace(base, expectations=expectations, event_delay_ms=500.0)
    before = cold_trace(32, 1e6, (2_048, 2_048), one.model, seed=9)
    served = World(one, [*before, *sibling_trace(50, 50.0, 4_096, one.model, seed=0)]).run()
    return n_computed(served[len(before) :])


def test_siblings_that_come_before_any_event_land_together_where_everybody_is_busy() -> None:
    assert siblings(expectations=True) <= 2
    assert siblings(expectations=False) >= 6, "the law has no other reason"


def test_a_run_is_the_same_every_time() -> None:
    base = routing_policies.scene(BLOCK_TOKENS, 50e9)
    trace = document_trace(Documents(document_tokens=3_500, rate_per_s=30.0, requests=60), base.model, 0)
    assert World(base, trace).run() == World(base, trace).run()


def test_a_turn_is_asked_only_after_the_answer_before_it() -> None:
    """Else it would find nothing of what the turn before left in the cache."""
    base = routing_policies.scene(BLOCK_TOKENS, None)
    kind = Documents(document_tokens=16_000, rate_per_s=1e6, sessions=1, documents=1, requests=3)
    served = World(base, document_trace(kind, base.model, 0)).run()
    assert served[0].cached_tokens == 0
    assert all(one.cached_tokens >= 15_000 for one in served[1:])
