"""What `--verify-kv` costs: time to first token, tokens per second and processor time, with it over without it, in one run.

    python -m benchmarks verify_kv [--rounds 40] [--limit-s 120] [--preset deep] [--prompt-tokens 768] [--json FILE]

Three pairs of real prefill and decode workers hand over the same prompts in turns: `plain`, `verified`, and `control`, which is
plain as well. Each round sends one batch to every pair; which goes first rotates. A ratio is that of two batches of one round:
their median and quartiles over all rounds. The control's ratio is what this machine makes of no difference at all: a ratio of
the verified pair says something as far as it lies outside the control's quartiles. Processor time is the kernel's account of all
threads of a worker: it does not count the wait for a core, so it is what remains comparable where others use the cores.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from services.worker.model.make import PRESETS, make_model
from tests.support.driver import Driver
from tests.support.processes import Cluster, cluster

BATCH, OUTPUT_TOKENS, VOCAB = 2, 16, 512
PAIRS = {"plain": "false", "verified": "true", "control": "false"}


@dataclass(frozen=True)
class Batch:
    """One batch on one pair."""

    ttft_ms: float
    """Mean over its prompts."""
    tokens_per_s: float
    prefill_cpu_ms: float
    decode_cpu_ms: float


@dataclass(frozen=True)
class Spread:
    """Of the ratios of all rounds."""

    lower_quartile: float
    median: float
    upper_quartile: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Needs two values."""
        return cls(*statistics.quantiles(values, n=4))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.lower_quartile:.3f} to {self.upper_quartile:.3f})"


@dataclass(frozen=True)
class Cost:
    """One transport."""

    transport: str
    rounds: int
    plain: Mapping[str, float]
    """Medians of the plain pair."""
    verified: Mapping[str, Spread]
    """Over plain."""
    control: Mapping[str, Spread]
    """Over plain, with no difference."""
    checked_pages: float
    mismatches: float


def cpu_ms(pid: int) -> float:
    """What the threads of a process that live have used of processors."""
    used_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it has just ended
            used_ns += int((task / "schedstat").read_text().split()[0])
    return used_ns / 1e6


def ask(processes: Cluster, driver: Driver, pair: str, prompts: Sequence[Sequence[int]]) -> Batch:
    """Send a batch and wait for its end."""
    pids = [processes.processes[f"{role}-{pair}"].pid for role in ("prefill", "decode")]
    before = [cpu_ms(pid) for pid in pids]
    began_s = time.perf_counter()
    sent = [
        driver.send(f"prefill-{pair}", prompt, decode=f"decode-{pair}", max_tokens=OUTPUT_TOKENS) for prompt in prompts
    ]
    first_s: dict[str, float] = {}

    def all_have_begun() -> bool:
        for one in sent:
            if driver.outcomes[one].tokens:
                first_s.setdefault(one, time.perf_counter() - began_s)
        return len(first_s) == len(sent)

    driver.until(all_have_begun, "all have begun")
    outcomes = driver.finish(sent)
    whole_s = time.perf_counter() - began_s
    if any(outcome.failed is not None for outcome in outcomes):
        raise SystemExit(f"a request failed: {outcomes}")
    used = [cpu_ms(pid) - earlier for pid, earlier in zip(pids, before, strict=True)]
    return Batch(statistics.mean(first_s.values()) * 1e3, len(sent) * OUTPUT_TOKENS / whole_s, *used)


def measure(folder: Path, model: Path, transport: str, options: argparse.Namespace) -> Cost:
    """One transport."""
    names = [f"{role}-{pair}" for pair in PAIRS for role in ("decode", "prefill")]
    folder.mkdir()
    with cluster(folder) as processes:
        for name in names:
            role, _, pair = name.partition("-")
            flags = {"transport": transport, "caching": 0, "device_memory": "256MiB", "threads": 1}
            processes.start(role, name, model=model, verify_kv=PAIRS[pair], **flags)
        processes.await_members(*names)
        with Driver([processes.members()[name] for name in names]) as driver:
            prefills = [name for name in names if name.startswith("prefill")]
            driver.until_reported(lambda: all(driver.reports[name].transports for name in prefills), "connected")  # type: ignore[index]
            found = turns(processes, driver, options)
            driver.refresh()
            counters = driver.reports["decode-verified"].counters  # type: ignore[index]
    parts = list(asdict(found["plain"][0]))
    over = {
        pair: {
            part: Spread.of(
                [getattr(a, part) / getattr(b, part) for a, b in zip(found[pair], found["plain"], strict=True)]
            )
            for part in parts
        }
        for pair in ("verified", "control")
    }
    return Cost(
        transport,
        len(found["plain"]),
        {part: statistics.median(getattr(one, part) for one in found["plain"]) for part in parts},
        over["verified"],
        over["control"],
        checked_pages=counters["kv_checked_pages_total"],
        mismatches=counters["kv_mismatches_total{path=handover}"],
    )


def turns(processes: Cluster, driver: Driver, options: argparse.Namespace) -> dict[str, list[Batch]]:
    """All rounds but the first, which warms up; at least two."""
    rng, order = random.Random(0), list(PAIRS)
    found = {pair: list[Batch]() for pair in PAIRS}
    until_s = time.monotonic() + options.limit_s
    for number in range(options.rounds + 1):
        prompts = [[rng.randrange(8, VOCAB) for _ in range(options.prompt_tokens)] for _ in range(BATCH)]
        for pair in order:
            batch = ask(processes, driver, pair, prompts)
            if number:
                found[pair].append(batch)
        order.append(order.pop(0))
        if number >= 2 and time.monotonic() > until_s:
            break
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; exit code 1 if nothing was checked or something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--limit-s", type=float, default=120.0, help="begin no round after so long, for each transport")
    parser.add_argument("--preset", choices=PRESETS, default="deep", help="of the model: deep has much KV for its size")
    parser.add_argument("--prompt-tokens", type=int, default=768)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as temporary:
        model = make_model(options.preset, Path(temporary) / "model")
        costs = [measure(Path(temporary) / transport, model, transport, options) for transport in ("shm", "tcp")]
    for cost in costs:
        print(
            f"{cost.transport}: {cost.rounds} rounds, {cost.checked_pages:.0f} pages checked, {cost.mismatches:.0f} wrong"
        )
        for part, plain in cost.plain.items():
            print(f"  {part:14} plain {plain:7.1f}   verified {cost.verified[part]}   control {cost.control[part]}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=1) + "\n")
    return int(any(cost.mismatches or not cost.checked_pages for cost in costs))


if __name__ == "__main__":
    sys.exit(main())
