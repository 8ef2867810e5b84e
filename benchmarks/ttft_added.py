"""What gateway and hops add to the time to the first token, and streamed tokens per second through one gateway.

    python -m benchmarks.ttft_added [--requests 200] [--json FILE]

A real system with the tiny model: gateway, prefill and decode over shared memory. Added time of a request = its TTFT
at an HTTP client minus the p50 time that the prefill worker computes the same prompts, taken in turn in the same run.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from services.worker.model.make import make_model
from tests.support.clients import ready, until
from tests.support.driver import Driver
from tests.support.processes import Cluster, cluster

TARGET_ADDED_P50_MS = 5.0
TARGET_TOKENS_PER_S = 3_000.0


def http_ttft_ms(client: httpx.Client, url: str, prompt: list[int]) -> float:
    """From sending the request to the first chunk with content."""
    body = {"model": "m", "prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": True, "stream": True}
    began_s = time.perf_counter()
    first_s = None
    with client.stream("POST", f"{url}/v1/completions", json={**body, "return_token_ids": True}) as response:
        for line in response.iter_lines():
            if first_s is None and line.startswith("data: {"):
                first_s = time.perf_counter()
    if first_s is None:
        raise SystemExit(f"no token came: {response.status_code}")
    return (first_s - began_s) * 1e3


def measure_added(processes: Cluster, url: str, requests: int, prompt_tokens: int) -> dict[str, float]:
    """One request at a time, HTTP and direct in turn."""
    rng = random.Random(3)
    names = ("prefill-0", "decode-0")
    http_ms: list[float] = []
    compute_ms: list[float] = []
    with Driver([processes.members()[name] for name in names]) as driver, httpx.Client(timeout=60) as client:
        for number in range(requests + 20):
            prompt = [rng.randrange(8, 1500) for _ in range(prompt_tokens)]
            ttft_ms = http_ttft_ms(client, url, prompt)
            outcome = driver.finish([driver.send("prefill-0", prompt, decode="decode-0", max_tokens=2)])[0]
            if number >= 20 and outcome.timings is not None:  # the first ones warm up
                http_ms.append(ttft_ms)
                compute_ms.append(outcome.timings.compute_ms)
    compute_p50_ms = statistics.median(compute_ms)
    added = sorted(ms - compute_p50_ms for ms in http_ms)
    return {
        "ttft_p50_ms": statistics.median(http_ms),
        "compute_p50_ms": compute_p50_ms,
        "added_p50_ms": statistics.median(added),
        "added_p90_ms": added[int(0.9 * len(added))],
        "target_added_p50_ms": TARGET_ADDED_P50_MS,
    }


def measure_throughput(url: str, folder: Path, streams: int) -> dict[str, float]:
    """The load generator's own figure."""
    from loadgen.__main__ import main as bench  # its command line is the public door

    out = folder / "bench"
    flags = f"--url {url} --concurrency {streams} --num-requests {streams * 8} --isl 32 --osl 256 --warmup {streams} --quiet"
    code = bench(["run", *flags.split(), "--out", str(out)])
    if code != 0:
        raise SystemExit(f"the load generator ended with {code}")
    report = json.loads((out / "result.json").read_text())
    return {
        "streams": streams,
        "streamed_tokens_per_s": report["output_throughput"],
        "target_tokens_per_s": TARGET_TOKENS_PER_S,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; exit code 1 if the added time misses its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as temporary:
        folder = Path(temporary)
        model = make_model("tiny", folder / "tiny")
        with cluster(folder) as processes:
            for role in ("decode", "prefill"):
                processes.start(role, f"{role}-0", model=model, served_model_name="m", device_memory="256MiB")
            processes.start("gateway", "gateway-0", model=model, served_model_name="m", port=0)
            processes.await_members("decode-0", "prefill-0", "gateway-0")
            url = processes.members()["gateway-0"].endpoint
            until(lambda: ready(url), "ready")
            result = measure_added(processes, url, options.requests, options.prompt_tokens)
            result |= measure_throughput(url, folder, options.streams)
    for name, value in result.items():
        print(f"{name:24} {value:10.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["added_p50_ms"] <= TARGET_ADDED_P50_MS else 1


if __name__ == "__main__":
    sys.exit(main())
