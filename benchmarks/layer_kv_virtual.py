"""LayerKV's overload in virtual time: time to the first token with layer-wise KV, what it costs in time per token, and the gate.

    python -m benchmarks.layer_kv_virtual [--seeds 3] [--link-gb-per-s 25] [--quick] [--json FILE]

Llama-2-7B on one L20 (prompts at 60 % of 119.5 TFLOP/s, steps at 80 % of 864 GB/s, KV of 55 000 tokens), Poisson arrivals at
1 request/s, N requests, 512 tokens of output. A second table has outputs of all lengths, which must be foretold. Medians over seeds; ratios are taken within a seed.

    baseline    a prompt starts when there is room for its KV and its answer's, first come first served
    layer-wise  a prompt waits for no more than the layers that must stay; with its first token it is parked until there is room
    gated       the same, and answers that are drawn or parked must have the time for it (TPOT 200 ms)
    core        the service's own mixed worker, which gives KV up and computes it again, without the gate and with it

The first three are a small loop (benchmarks/_layer_kv.py) around the service's own policies, watch and gate; the last two its
own core (benchmarks/_virtual_worker.py). A violation is a first token after 3 s, or a mean time per token above 200 ms. The
ratio is a property of an open loop in overload: it grows with N without bound, and means nothing without the columns beside it.
"""

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks._layer_kv import Device, Job, LayerKvWorker, Way, poisson
from benchmarks._virtual_worker import Ask, VirtualWorker
from common.cost.step_cost import StepCost
from common.kv_layout import KvLayout
from services.worker.core.slo import Slo
from services.worker.settings import WorkerSettings

LAYERS, HIDDEN, PARAMETERS = 32, 4096, 6.74e9
FLOP_PER_S, BYTES_PER_S = 0.6 * 119.5e12, 0.8 * 864e9
TOKEN_BYTES = LAYERS * 2 * HIDDEN * 2
COST = StepCost(
    base_ms=2 * PARAMETERS / BYTES_PER_S * 1e3,
    token_ms=2 * PARAMETERS / FLOP_PER_S * 1e3,
    pair_ms=4 * LAYERS * HIDDEN / FLOP_PER_S * 1e3,
    row_ms=0.0,
    kv_ms=TOKEN_BYTES / BYTES_PER_S * 1e3,
    chunk_tokens=8192,
)
KV_TOKENS, OUTPUT_TOKENS, RATE_PER_S = 55_000, 512, 1.0
SLO = Slo(ttft_ms=3000.0, tpot_ms=200.0)
SPREAD, PERCENTILES = 0.9, (0.1, 0.5, 0.9)
PROMPTS, COUNTS = (1024, 2048, 4096), (50, 100, 200)


@dataclass(frozen=True)
class Times:
    """Of one request."""

    n_tokens: int
    asked_ms: float
    ttft_ms: float
    tpot_ms: float
    end_ms: float


@dataclass(frozen=True)
class Row:
    """One way of serving in one case: medians over seeds."""

    prompt_tokens: int
    requests: int
    way: str
    mean_ttft_s: float
    p99_ttft_s: float
    mean_ttft_ratio: float
    """Of the baseline's to this."""
    p99_ttft_ratio: float
    mean_tpot_ms: float
    throughput_ratio: float
    """Output tokens per second, to the baseline's."""
    violations: float
    parked_gb: float
    """The most at once in host memory."""


@dataclass(frozen=True)
class Run:
    """One way, one seed."""

    times: list[Times]
    parked_gb: float = 0.0

    @property
    def mean_ms(self) -> float:
        return statistics.fmean(one.ttft_ms for one in self.times)

    @property
    def p99_ms(self) -> float:
        return sorted(one.ttft_ms for one in self.times)[math.ceil(0.99 * len(self.times)) - 1]

    @property
    def tpot_ms(self) -> float:
        return statistics.fmean(one.tpot_ms for one in self.times)

    @property
    def tokens_per_s(self) -> float:
        first_ms, last_ms = min(one.asked_ms for one in self.times), max(one.end_ms for one in self.times)
        return sum(one.n_tokens for one in self.times) / (last_ms - first_ms) * 1e3

    @property
    def violations(self) -> float:
        """Share of requests."""
        return statistics.fmean(one.ttft_ms > SLO.ttft_ms or one.tpot_ms > SLO.tpot_ms for one in self.times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--link-gb-per-s", type=float, default=25.0)
    parser.add_argument("--quick", action="store_true", help="100 requests only")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = Device(
        cost=COST,
        layers=LAYERS,
        layer_token_bytes=TOKEN_BYTES // LAYERS,
        kv_tokens=KV_TOKENS,
        link_bytes_per_s=arguments.link_gb_per_s * 1e9,
        host_tokens=10**9,
    )
    counts = (100,) if arguments.quick else COUNTS
    rows = [row for tokens in PROMPTS for n in counts for row in case(device, tokens, n, arguments.seeds)]
    show(rows)
    print(
        f"\noutputs of {1 - SPREAD:.0%} to {1 + SPREAD:.0%} of {OUTPUT_TOKENS} tokens, which the client does not say:\n"
    )
    spread_rows = [row for tokens in PROMPTS[1:] for row in case(device, tokens, 100, arguments.seeds, SPREAD)]
    show(spread_rows)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows + spread_rows], indent=1))
    return 0


def case(device: Device, prompt_tokens: int, n: int, seeds: int, spread: float = 0.0) -> list[Row]:
    """All ways with the same requests. `spread`: of output lengths, as a share of their mean."""
    ways: dict[str, Callable[[list[Job]], Run]] = {
        "baseline": partial(looped, device, layer_wise=False, gated=False),
        "layer-wise": partial(looped, device, layer_wise=True, gated=False),
    }
    if spread:  # lengths must be learned: how far from the longest to foretell matters
        for share in PERCENTILES:
            ways[f"gated, {share:.0%}"] = partial(looped, device, layer_wise=True, gated=True, percentile=share)
    else:
        ways["gated"] = partial(looped, device, layer_wise=True, gated=True)
        ways |= {"core, fcfs": lambda jobs: served(jobs, "fcfs"), "core, slo": lambda jobs: served(jobs, "slo")}
    runs: dict[str, list[Run]] = {
        name: [way(poisson(n, RATE_PER_S, prompt_tokens, OUTPUT_TOKENS, seed, spread)) for seed in range(seeds)]
        for name, way in ways.items()
    }
    return [row_of(prompt_tokens, n, name, found, runs["baseline"]) for name, found in runs.items()]


def looped(device: Device, jobs: list[Job], *, layer_wise: bool, gated: bool, percentile: float = 0.9) -> Run:
    """Through the small loop."""
    found = LayerKvWorker(device, Way(layer_wise=layer_wise, gated=gated, slo=SLO, percentile=percentile)).run(jobs)
    times = [Times(job.output_tokens, job.at_ms, job.ttft_ms, job.tpot_ms, job.last_ms) for job in found.jobs]
    return Run(times, found.most_parked_tokens * TOKEN_BYTES / 1e9)


def served(jobs: Sequence[Job], admission: str) -> Run:
    """Through the service's own worker. Prompts share nothing."""
    layout = KvLayout(layers=1, kv_heads=1, head_dim=8, dtype="float32", block_tokens=16)
    settings = WorkerSettings(
        model="llama-2-7b",
        caching=0,
        max_running=256,
        max_step_tokens=COST.chunk_tokens,
        admission=admission,
        slo_tpot_ms=SLO.tpot_ms,
        slo_ttft_ms=SLO.ttft_ms,
    )
    draw = random.Random(0)
    asks = [Ask(one.at_ms, tuple(draw.choices(range(2**20), k=one.prompt_tokens)), OUTPUT_TOKENS) for one in jobs]
    found = VirtualWorker(settings, COST, layout, KV_TOKENS // layout.block_tokens).run(asks)
    return Run([Times(OUTPUT_TOKENS, one.asked_ms, one.ttft_ms, one.tpot_ms, one.token_ms[-1]) for one in found])


def row_of(prompt_tokens: int, n: int, way: str, runs: list[Run], baseline: list[Run]) -> Row:
    """Medians."""
    pairs = list(zip(runs, baseline, strict=True))

    def middle(values: list[float]) -> float:
        return statistics.median(values)

    return Row(
        prompt_tokens=prompt_tokens,
        requests=n,
        way=way,
        mean_ttft_s=middle([run.mean_ms / 1e3 for run in runs]),
        p99_ttft_s=middle([run.p99_ms / 1e3 for run in runs]),
        mean_ttft_ratio=middle([base.mean_ms / run.mean_ms for run, base in pairs]),
        p99_ttft_ratio=middle([base.p99_ms / run.p99_ms for run, base in pairs]),
        mean_tpot_ms=middle([run.tpot_ms for run in runs]),
        throughput_ratio=middle([run.tokens_per_s / base.tokens_per_s for run, base in pairs]),
        violations=middle([run.violations for run in runs]),
        parked_gb=middle([run.parked_gb for run in runs]),
    )


def show(rows: Sequence[Row]) -> None:
    """A table that can go into a page as it is."""
    print(
        "| prompt | N | way | mean TTFT | P99 TTFT | mean ratio | P99 ratio | TPOT | throughput | violations | host KV |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.prompt_tokens} | {row.requests} | {row.way} | {row.mean_ttft_s:.2f} s | {row.p99_ttft_s:.2f} s "
            f"| {row.mean_ttft_ratio:.1f} | {row.p99_ttft_ratio:.1f} | {row.mean_tpot_ms:.0f} ms "
            f"| {row.throughput_ratio:.3f} | {row.violations:.0%} | {row.parked_gb:.0f} GB |"
        )


if __name__ == "__main__":
    sys.exit(main())
