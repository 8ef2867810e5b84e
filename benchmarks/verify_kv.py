"""What `--verify-kv` costs: time to first token and tokens per second, with it over without it, in one run.

    python -m benchmarks.verify_kv [--rounds 8] [--prompt-tokens 768] [--json FILE]

Two pairs of real prefill and decode workers, one with the flag and one without, hand over the same prompts in turns. Each
round sends a batch to one pair, then to the other; which goes first alternates. Ratios are those of one round's two batches,
so that what else the machine does weighs on both: their median, and the least and greatest time to first token.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from services.worker.model.make import make_model
from tests.support.driver import Driver
from tests.support.processes import cluster

BATCH, OUTPUT_TOKENS, VOCAB = 4, 32, 512


@dataclass(frozen=True)
class Cost:
    """Medians over all rounds, but for the least and the greatest."""

    transport: str
    plain_ttft_ms: float
    ttft_ratio: float
    ttft_ratio_least: float
    ttft_ratio_greatest: float
    plain_tokens_per_s: float
    throughput_ratio: float
    checked_pages: float
    mismatches: float


def ask(driver: Driver, pair: str, prompts: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Seconds until every prompt of a batch has its first token, and tokens per second of the whole batch."""
    began_s = time.perf_counter()
    sent = [
        driver.send(f"prefill-{pair}", prompt, decode=f"decode-{pair}", max_tokens=OUTPUT_TOKENS) for prompt in prompts
    ]
    driver.until(lambda: all(driver.outcomes[one].tokens for one in sent), "all have begun")
    first_s = time.perf_counter() - began_s
    outcomes = driver.finish(sent)
    if any(outcome.failed is not None for outcome in outcomes):
        raise SystemExit(f"a request failed: {outcomes}")
    return first_s, len(sent) * OUTPUT_TOKENS / (time.perf_counter() - began_s)


def measure(folder: Path, model: Path, transport: str, rounds: int, prompt_tokens: int) -> Cost:
    """One transport."""
    pairs = {"plain": "false", "verified": "true"}
    names = [f"{role}-{pair}" for pair in pairs for role in ("decode", "prefill")]
    folder.mkdir()
    with cluster(folder) as processes:
        for name in names:
            role, _, pair = name.partition("-")
            flags = {"transport": transport, "caching": 0, "device_memory": "256MiB", "threads": 1}
            processes.start(role, name, model=model, verify_kv=pairs[pair], **flags)
        processes.await_members(*names)
        with Driver([processes.members()[name] for name in names]) as driver:
            prefills = [name for name in names if name.startswith("prefill")]
            driver.until_reported(lambda: all(driver.reports[name].transports for name in prefills), "connected")  # type: ignore[index]
            rng, found = random.Random(0), {pair: list[tuple[float, float]]() for pair in pairs}
            for number in range(rounds + 1):
                prompts = [[rng.randrange(8, VOCAB) for _ in range(prompt_tokens)] for _ in range(BATCH)]
                for pair in sorted(pairs, reverse=number % 2 == 0):
                    found[pair].append(ask(driver, pair, prompts))
            driver.refresh()
            counters = driver.reports["decode-verified"].counters  # type: ignore[index]
    ttft, rate = (
        {pair: statistics.median(one[part] for one in found[pair][1:]) for pair in pairs} for part in range(2)
    )
    ttft_ratios, rate_ratios = (
        [
            with_it[part] / without[part]
            for with_it, without in zip(found["verified"][1:], found["plain"][1:], strict=True)
        ]
        for part in range(2)
    )
    return Cost(
        transport=transport,
        plain_ttft_ms=ttft["plain"] * 1e3,
        ttft_ratio=statistics.median(ttft_ratios),
        ttft_ratio_least=min(ttft_ratios),
        ttft_ratio_greatest=max(ttft_ratios),
        plain_tokens_per_s=rate["plain"],
        throughput_ratio=statistics.median(rate_ratios),
        checked_pages=counters["kv_checked_pages_total"],
        mismatches=counters["kv_mismatches_total{path=handover}"],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; exit code 1 if nothing was checked or something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=768)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as temporary:
        model = make_model("deep", Path(temporary) / "model")
        costs = [
            measure(Path(temporary) / transport, model, transport, options.rounds, options.prompt_tokens)
            for transport in ("shm", "tcp")
        ]
    for cost in costs:
        print(
            "  ".join(
                f"{name}={value:.3f}" if isinstance(value, float) else value for name, value in asdict(cost).items()
            )
        )
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=1) + "\n")
    return int(any(cost.mismatches or not cost.checked_pages for cost in costs))


if __name__ == "__main__":
    sys.exit(main())
