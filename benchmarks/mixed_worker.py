"""Decode throughput of a whole mixed worker process, over its sockets, as a ratio to `transformers.generate`.

    python -m benchmarks.mixed_worker [--model DIR] [--streams 16] [--rounds 3] [--json FILE]

Same checkpoint (0.5B shape), same batch, same cores, taking turns in one run; medians. The worker's clock starts when
every stream has its first token, generate's with its own first token.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForCausalLM

from benchmarks.decode_throughput import TARGET_RATIO, measure_reference
from services.worker.engine.torch_options import configure_torch
from services.worker.model.make import make_model
from tests.support.driver import Driver
from tests.support.processes import cluster


def measure_worker(driver: Driver, prompts: list[list[int]], output_tokens: int) -> float:
    """Decoded tokens per second over all streams, first tokens not counted."""
    requests = [
        driver.send("mixed-0", prompt, max_tokens=output_tokens, timeout_ms=3_600_000, seed=1) for prompt in prompts
    ]
    outcomes = [driver.outcomes[request] for request in requests]
    driver.until(lambda: all(o.tokens or o.failed for o in outcomes), "first tokens", timeout_s=3600)
    had = sum(len(o.tokens) for o in outcomes)
    started_s = time.perf_counter()
    driver.finish(requests, timeout_s=3600)
    failed = [o.failed for o in outcomes if o.failed is not None]
    if failed:
        raise SystemExit(f"a request failed: {failed[0]}")
    return (sum(len(o.tokens) for o in outcomes) - had) / (time.perf_counter() - started_s)


def run(model: Path, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Both sides in turn."""
    cores = len(os.sched_getaffinity(0))
    configure_torch(cores)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16").eval()
    rng = random.Random(16)
    prompts = [[rng.randrange(8, 1500) for _ in range(options.prompt_tokens)] for _ in range(options.streams)]
    worker: list[float] = []
    generate: list[float] = []
    with cluster(folder) as processes:
        processes.start("mixed", "mixed-0", model=model, dtype="bfloat16", device_memory="512MiB", threads=cores)
        processes.await_members("mixed-0", timeout_s=300)
        with Driver([processes.members()["mixed-0"]]) as driver:
            measure_worker(driver, prompts, 3)
            for number in range(options.rounds):
                worker.append(measure_worker(driver, prompts, options.output_tokens))
                generate.append(
                    measure_reference(reference, prompts, options.reference_output_tokens).decode_tokens_per_s
                )
                print(
                    f"round {number + 1}: worker {worker[-1]:.1f}, generate {generate[-1]:.1f} tok/s", file=sys.stderr
                )
    return {
        "streams": options.streams,
        "threads": cores,
        "worker_decode_tokens_per_s": statistics.median(worker),
        "generate_decode_tokens_per_s": statistics.median(generate),
        "ratio": statistics.median(worker) / statistics.median(generate),
        "target_ratio": TARGET_RATIO,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 if the ratio misses its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=33)
    parser.add_argument("--reference-output-tokens", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as temporary:
        folder = Path(temporary)
        result = run(options.model or make_model("small", folder / "small"), options, folder)
    for name, value in result.items():
        print(f"{name:32} {value:10.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["ratio"] >= TARGET_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
