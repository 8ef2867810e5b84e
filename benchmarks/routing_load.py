"""Routing rules under load that pulls them apart, in virtual time: fairness, a popular prefix, a burst of siblings.

    python -m benchmarks.routing_load [--requests 10000] [--seeds 5] [--json FILE]

Fairness: prompts that share nothing, over 8 workers; the busiest worker's share over the mean. A popular prefix beside a
uniform tail: what the load gate (route_gate) does to hits and to the time to the first token. Siblings: 50 prompts with a new
prefix within 50 ms, while the workers' events need half a second: how many compute the prefix. Workers are virtual, the
gateway's cores are real (benchmarks/_virtual.py); the model is Llama-2-13B on two H100s at half their peak.
"""

import argparse
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks._llama13b import model, roofline
from benchmarks._traces import (
    Outcome,
    Popular,
    cold_trace,
    outcome,
    popular_trace,
    quantile,
    sibling_trace,
)
from benchmarks._virtual import Scene, Served, Visit, World
from common.policy.routing import Router
from common.policy.routing_rules import RULES

TARGET_FAIR = 1.2
WORKERS, BLOCK_TOKENS = 8, 64
SHAPES = {"8 mixed": ("mixed",) * 8, "8 prefill + 8 decode": ("prefill",) * 8 + ("decode",) * 8}
COLD_TOKENS, COLD_LOAD = (64, 960), 0.8
GATES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, math.inf)
SIBLINGS, WITHIN_MS, SIBLING_PREFIX_TOKENS, SLOW_EVENTS_MS = 50, 50.0, 4_096, 500.0
QUEUED_PROMPTS, QUEUED_TOKENS = (0, 4), 2_048


@dataclass(frozen=True)
class Fairness:
    """One rule, one shape. The busiest over the mean, by requests and by prompt tokens."""

    shape: str
    rule: str
    by_requests: float
    by_tokens: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Gated:
    """A popular prefix under one rule; medians over seeds."""

    load: float
    rule: str
    gate: float | None
    popular_hit_share: float
    p50_ms: float
    p99_ms: float
    tail_p99_ms: float
    """Of the requests that share nothing."""
    busiest: float
    """By prompt tokens computed, over the mean."""


@dataclass(frozen=True)
class Burst:
    """Siblings under one rule; medians over seeds."""

    queued_prompts: int
    """That every worker has when the burst begins."""
    rule: str
    expectations: bool
    computed_prefix: float
    """How many computed it."""
    workers: float
    p99_ms: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    fair = fairness(arguments.requests)
    show_fairness(fair, arguments.requests)
    gated = [one for load in (0.6, 0.9) for one in popular(load, 2_000, arguments.seeds)]
    show_gated(gated)
    bursts = siblings(arguments.seeds)
    show_bursts(bursts)
    reached = all(one.by_requests < TARGET_FAIR for one in fair)
    print(
        f"\ntarget: busiest worker below {TARGET_FAIR} of the mean for every rule: {'reached' if reached else 'MISSED'}"
    )
    if arguments.json:
        body = {
            "fairness": [asdict(one) for one in fair],
            "popular": [asdict(one) for one in gated],
            "siblings": [asdict(one) for one in bursts],
        }
        arguments.json.write_text(json.dumps(body, indent=1))
    return 0 if reached else 1


def scene(roles: Sequence[str], router: Router) -> Scene:
    return Scene(roles=roles, model=model(BLOCK_TOKENS), cost=roofline(), router=router)


# -- fairness


def fairness(n: int) -> list[Fairness]:
    return [fair(shape, rule, n) for shape in SHAPES for rule in RULES]


def fair(shape: str, rule: str, n: int) -> Fairness:
    one = scene(SHAPES[shape], Router(prefill=rule, decode=rule))
    middle = sum(COLD_TOKENS) // 2
    rate_per_s = COLD_LOAD * WORKERS / one.cost.exec_ms(middle, 0) * 1e3
    served = World(one, cold_trace(n, rate_per_s, COLD_TOKENS, one.model, seed=0)).run()
    ranked = sorted(request.ttft_ms for request in served)
    return Fairness(
        shape,
        rule,
        busiest(Counter(request.entry for request in served)),
        busiest(shares(served, computed_only=False)),
        quantile(ranked, 0.5),
        quantile(ranked, 0.99),
    )


def shares(served: Sequence[Served], *, computed_only: bool) -> Counter[str]:
    found: Counter[str] = Counter()
    for one in served:
        found[one.entry] += one.prompt_tokens - (one.cached_tokens if computed_only else 0)
    return found


def busiest(found: Counter[str]) -> float:
    return max(found.values()) * WORKERS / found.total()


def show_fairness(rows: Sequence[Fairness], n: int) -> None:
    print(f"{n} prompts of {COLD_TOKENS[0]} to {COLD_TOKENS[1]} tokens that share nothing, {COLD_LOAD:.0%} load")
    print(f"{'':24}{'rule':18}{'requests':>10}{'tokens':>8}{'P50 ms':>9}{'P99 ms':>9}   (busiest worker over the mean)")
    for one in rows:
        print(
            f"{one.shape:24}{one.rule:18}{one.by_requests:10.3f}{one.by_tokens:8.3f}{one.p50_ms:9.1f}{one.p99_ms:9.1f}"
        )
    for shape in SHAPES:
        here = [one for one in rows if one.shape == shape]
        best, worst = min(here, key=lambda one: one.p99_ms), max(here, key=lambda one: one.p99_ms)
        print(f"{shape}: worst P99 is {worst.rule}'s, {worst.p99_ms / best.p99_ms:.2f} times {best.rule}'s")


# -- a popular prefix


def popular(load: float, n: int, seeds: int) -> list[Gated]:
    """`load`: of the workers if every popular prefix is found in a cache."""
    cost, kind = roofline(), Popular(n=n, rate_per_s=1.0)
    whole = kind.prefix_tokens + kind.tail_tokens
    mean_ms = kind.share * cost.exec_ms(whole, kind.prefix_tokens) + (1 - kind.share) * cost.exec_ms(
        kind.other_tokens, 0
    )
    kind = replace(kind, rate_per_s=load * WORKERS / mean_ms * 1e3)
    base = scene(SHAPES["8 mixed"], Router())
    traces = [popular_trace(kind, base.model, seed) for seed in range(seeds)]
    routers = [(Router(prefill="longest-prefix", gate=gate), gate) for gate in GATES]
    others = [(Router(prefill=rule), None) for rule in ("predicted-time", "least-load")]
    return [gated(load, replace(base, router=router), gate, traces) for router, gate in [*routers, *others]]


def gated(load: float, one: Scene, gate: float | None, traces: Sequence[tuple[list[Visit], list[bool]]]) -> Gated:
    runs = []
    for trace, is_popular in traces:
        served = World(one, trace).run()
        hot = outcome([s for s, yes in zip(served, is_popular, strict=True) if yes])
        tail = outcome([s for s, yes in zip(served, is_popular, strict=True) if not yes])
        runs.append((outcome(served), hot, tail, busiest(shares(served, computed_only=True))))
    return Gated(
        load,
        one.router.prefill,
        gate,
        statistics.median(hot.hit_share for _, hot, _, _ in runs),
        statistics.median(whole.p50_ms for whole, _, _, _ in runs),
        statistics.median(whole.p99_ms for whole, _, _, _ in runs),
        statistics.median(tail.p99_ms for _, _, tail, _ in runs),
        statistics.median(most for _, _, _, most in runs),
    )


def show_gated(rows: Sequence[Gated]) -> None:
    print(
        "\nhalf of all requests begin with one prefix of 4096 tokens, the others (2048 tokens) share nothing; 8 mixed workers"
    )
    for load in sorted({one.load for one in rows}):
        print(
            f"  load {load:.0%}{'':24}{'gate':>6}{'hits of popular':>17}{'P50 ms':>9}{'P99 ms':>9}{'tail P99':>10}{'busiest':>9}"
        )
        here = [one for one in rows if one.load == load]
        for one in here:
            gate = "-" if one.gate is None else f"{one.gate:g}"
            print(
                f"    {one.rule:30}{gate:>6}{one.popular_hit_share:17.0%}{one.p50_ms:9.0f}{one.p99_ms:9.0f}"
                f"{one.tail_p99_ms:10.0f}{one.busiest:9.2f}"
            )
        best, chosen = min(here, key=lambda one: one.p99_ms), next(o for o in here if o.rule == "predicted-time")
        worst = max(here, key=lambda one: one.p99_ms)
        print(
            f"    best P99: {best.rule}, gate {best.gate}; predicted-time's is {chosen.p99_ms / best.p99_ms:.2f} times it; "
            f"worst: {worst.rule}, gate {worst.gate}, {worst.p99_ms / best.p99_ms:.1f} times it"
        )


# -- siblings


def siblings(seeds: int) -> list[Burst]:
    return [
        burst(queued, rule, expectations, seeds)
        for queued in QUEUED_PROMPTS
        for rule in ("longest-prefix", "predicted-time", "least-load")
        for expectations in (True, False)
    ]


def burst(queued: int, rule: str, expectations: bool, seeds: int) -> Burst:
    base = scene(SHAPES["8 mixed"], Router(prefill=rule))
    one = replace(base, expectations=expectations, event_delay_ms=SLOW_EVENTS_MS)
    found: list[tuple[int, int, Outcome]] = []
    for seed in range(seeds):
        before = cold_trace(queued * WORKERS, 1e6, (QUEUED_TOKENS, QUEUED_TOKENS), one.model, seed + 1_000)
        trace = [*before, *sibling_trace(SIBLINGS, WITHIN_MS, SIBLING_PREFIX_TOKENS, one.model, seed)]
        served = World(one, trace).run()[len(before) :]
        found.append((n_computed(served), len({s.entry for s in served}), outcome(served)))
    return Burst(
        queued,
        rule,
        expectations,
        statistics.median(n for n, _, _ in found),
        statistics.median(workers for _, workers, _ in found),
        statistics.median(times.p99_ms for _, _, times in found),
    )


def n_computed(served: Sequence[Served]) -> int:
    """Siblings that found less than the whole prefix."""
    return sum(one.cached_tokens < SIBLING_PREFIX_TOKENS for one in served)


def show_bursts(rows: Sequence[Burst]) -> None:
    print(
        f"\n{SIBLINGS} siblings within {WITHIN_MS:g} ms share a new prefix of {SIBLING_PREFIX_TOKENS} tokens; "
        f"events take {SLOW_EVENTS_MS:g} ms"
    )
    print(f"  {'queued prompts':18}{'rule':18}{'expectations':14}{'compute the prefix':>20}{'workers':>9}{'P99 ms':>9}")
    for one in rows:
        print(
            f"  {one.queued_prompts:<18}{one.rule:18}{'on' if one.expectations else 'off':14}{one.computed_prefix:20g}{one.workers:9g}{one.p99_ms:9.0f}"
        )
    print(
        "idle workers compute the prefix each: nobody's first token comes sooner by waiting for a sibling's. Behind queues "
        "the rules\nthat look at caches send siblings after each other: less is computed, and the burst alone ends later"
    )


if __name__ == "__main__":
    sys.exit(main())
