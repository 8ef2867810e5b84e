"""How much of the hand-over's copying hides behind the computation, and what the hand-over adds to the first token.

    python -m benchmarks.handover_overlap [--model DIR] [--prompt-tokens 1024] [--requests 6] [--json FILE]

A real prefill and a real decode process over shared memory; 0.5B shape unless --model says otherwise. Hidden share =
1 - (time between the last computed layer and the hand-over message) / (time the copier spent copying), both taken on
the prefill worker's clock, summed over the requests.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common.ids import WorkerId
from common.messages.requests import Timings
from services.worker.model.make import make_model
from tests.support.driver import Driver
from tests.support.processes import cluster

TARGET_HIDDEN_SHARE = 0.8
PREFILL = WorkerId("prefill-0")


def measure(model: Path, prompt_tokens: int, requests: int, folder: Path) -> dict[str, float]:
    """Prompts one after the other, so that nothing but their own computation can hide the copies."""
    rng = random.Random(5)
    with cluster(folder) as processes:
        common = {"model": model, "device_memory": "512MiB", "transport": "shm"}
        processes.start("decode", "decode-0", threads=1, **common)
        processes.start("prefill", "prefill-0", threads=len(os.sched_getaffinity(0)), **common)  # the only one at work
        processes.await_members("decode-0", "prefill-0", timeout_s=180)
        with Driver([processes.members()[name] for name in ("decode-0", "prefill-0")]) as driver:
            driver.until(lambda: PREFILL in driver.reports and bool(driver.reports[PREFILL].transports), "connected")
            ask(driver, rng, prompt_tokens)  # warm-up
            before = counters(driver)
            timings = [ask(driver, rng, prompt_tokens) for _ in range(requests)]
            after = counters(driver)
            link = driver.reports[PREFILL].transports[0]
    copy_ms = after["kv_copy_ms_total"] - before["kv_copy_ms_total"]
    copied_bytes = after["kv_copied_bytes_total"] - before["kv_copied_bytes_total"]
    exposed_ms = sum(t.transfer_ms for t in timings)
    compute_ms = sum(t.compute_ms for t in timings)
    return {
        "requests": requests,
        "prompt_tokens": prompt_tokens,
        "transport_gib_per_s": link.gib_per_s,
        "compute_ms_per_request": compute_ms / requests,
        "copy_ms_per_request": copy_ms / requests,
        "copied_mib_per_request": copied_bytes / requests / 2**20,
        "exposed_ms_per_request": exposed_ms / requests,
        "hidden_share": max(0.0, 1 - exposed_ms / copy_ms),
        "exposed_share_of_compute": exposed_ms / compute_ms,
        "target_hidden_share": TARGET_HIDDEN_SHARE,
    }


def ask(driver: Driver, rng: random.Random, prompt_tokens: int) -> Timings:
    """One request; where its time to the first token went."""
    prompt = [rng.randrange(8, 1500) for _ in range(prompt_tokens)]
    outcome = driver.finish(
        [driver.send("prefill-0", prompt, decode="decode-0", max_tokens=2, timeout_ms=900_000)], timeout_s=900
    )[0]
    if outcome.failed is not None or outcome.timings is None:
        raise SystemExit(f"a request failed: {outcome.failed}")
    return outcome.timings


def counters(driver: Driver) -> dict[str, float]:
    """Totals of the prefill worker, fresh."""
    driver.reports.clear()
    driver.until(lambda: PREFILL in driver.reports, "a fresh report")
    return dict(driver.reports[PREFILL].counters)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as temporary:
        folder = Path(temporary)
        model = arguments.model
        if model is None:
            model = folder / "small"
            make_model("small", model)
        result = measure(model, arguments.prompt_tokens, arguments.requests, folder)
    for name, value in result.items():
        print(f"{name:28} {value:10.3f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
