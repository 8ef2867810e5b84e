"""How near the sum of a request's phases comes to the time to the first token that its client measured.

    python -m benchmarks.phases [--requests 40] [--json FILE]

Real processes with the tiny model, one request at a time over one kept connection, streamed. Kinds of path: handed over
(short, long, cached) with pages written by shared memory, the same over tcp, a mixed worker, a decode worker that
computes a cached prompt's rest itself. Prints, per kind, p50 of client TTFT, the median of sum/client, and the share of
`wire`, which is what no worker's clock explains. Exit code 1 if a median is off by more than 5 %.
"""

import argparse
import json
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any  # Any: JSON

from services.worker.model.make import make_model
from tests.support.clients import ready, until
from tests.support.processes import cluster

_MOST_OFF = 0.05
_WARM_UP = 5


@dataclass(frozen=True, slots=True)
class Seen:
    """One request, as its client and as the gateway saw it."""

    client_ms: float
    phases_ms: dict[str, float]
    cached_tokens: int

    @property
    def ratio(self) -> float:
        """Sum of the phases to what the client saw."""
        return sum(self.phases_ms.values()) / self.client_ms


def ask(connection: socket.socket, prompt: list[int]) -> Seen:
    """From the first byte sent to the first chunk heard: a client library's own milliseconds are no part of serving."""
    fields = {"model": "m", "prompt": prompt, "max_tokens": 3, "temperature": 0, "ignore_eos": True, "stream": True}
    fields |= {"return_token_ids": True, "stream_options": {"include_usage": True}}
    body = json.dumps(fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: gateway\r\nx-penstock-explain: 1\r\ncontent-length: {len(body)}\r\n\r\n"
    heard, first_s = b"", None
    began_s = time.perf_counter()
    connection.sendall(head.encode() + body)
    while not heard.endswith(b"0\r\n\r\n"):
        piece = connection.recv(65536)
        heard += piece
        if first_s is None and b"data: {" in heard:
            first_s = time.perf_counter()
        if not piece or not heard.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"no answer: {heard[:500]!r}")
    told: dict[str, Any] = {}
    cached = 0
    for line in heard.split(b"\n"):
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            told = chunk.get("penstock") or told
            cached = ((chunk.get("usage") or {}).get("prompt_tokens_details") or {}).get("cached_tokens", cached)
    if first_s is None or not told:
        raise SystemExit(f"no token came: {heard[:500]!r}")
    return Seen((first_s - began_s) * 1e3, told["phases_ms"], cached)


def measure(url: str, requests: int, prompt: Callable[[int], list[int]]) -> list[Seen]:
    """In turn, the first few for warming up only."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return [ask(connection, prompt(number)) for number in range(requests + _WARM_UP)][_WARM_UP:]


def summary(seen: list[Seen]) -> dict[str, float]:
    """Medians."""
    return {
        "client_p50_ms": round(statistics.median(one.client_ms for one in seen), 2),
        "sum_to_client": round(statistics.median(one.ratio for one in seen), 4),
        "wire_share": round(statistics.median(one.phases_ms["wire"] / one.client_ms for one in seen), 4),
        "cached_tokens": statistics.median(one.cached_tokens for one in seen),
    }


def run(folder: Path, workers: Sequence[str], flags: dict[str, Any], requests: int) -> dict[str, dict[str, float]]:
    """One system, all prompts it is asked."""
    rng, model = random.Random(5), make_model("tiny", folder / "tiny")
    fresh = {n: [[rng.randrange(8, 1500) for _ in range(n)] for _ in range(requests + _WARM_UP)] for n in (32, 900)}
    gateway = {"local_prefill_tokens": flags.pop("local_prefill_tokens", 0)}
    with cluster(folder) as processes:
        for role in workers:
            processes.start(role, f"{role}-0", model=model, served_model_name="m", device_memory="256MiB", **flags)
        processes.start("gateway", "gateway-0", model=model, served_model_name="m", port=0, **gateway)
        processes.await_members("gateway-0", *(f"{role}-0" for role in workers))
        url = processes.members()["gateway-0"].endpoint
        until(lambda: ready(url), "ready")
        return {
            "short": summary(measure(url, requests, lambda number: fresh[32][number])),
            "long": summary(measure(url, requests, lambda number: fresh[900][number])),
            "long, cached": summary(measure(url, requests, lambda number: fresh[900][-1])),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; exit code 1 if a sum is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    systems: dict[str, tuple[Sequence[str], dict[str, Any]]] = {
        "handed over, shared memory": (("prefill", "decode"), {}),
        "handed over, tcp": (("prefill", "decode"), {"transport": "tcp"}),
        "local on the decode worker": (("prefill", "decode"), {"local_prefill_tokens": 64}),
        "mixed": (("mixed",), {}),
    }
    found: dict[str, dict[str, float]] = {}
    for name, (workers, flags) in systems.items():
        with tempfile.TemporaryDirectory(prefix="penstock-bench-") as temporary:
            for kind, row in run(Path(temporary), workers, dict(flags), options.requests).items():
                found[f"{name}, {kind}"] = row
                print(f"{name + ', ' + kind:42}", *(f"{key}={value:g}" for key, value in row.items()), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(abs(row["sum_to_client"] - 1) <= _MOST_OFF for row in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
