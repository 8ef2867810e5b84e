"""How near the sum of a request's phases comes to the time to the first token that its client measured.

    python -m benchmarks.phases [--requests 40] [--preset mini] [--only WORD] [--json FILE]

Real processes, one request at a time over one kept connection, streamed. Paths: handed over (short, long, cached) with
pages written by shared memory, the same over tcp, a mixed worker, a decode worker that computes short prompts itself;
then KV fetched from a KV store after the prefill worker was started anew, prompts whose first attempt failed on a
prefill worker that sends wrong bytes (fault kit, `--verify-kv`), prompts whose layers go to the decode worker while they
are computed, and prompts that come to a mixed worker whose other answers are parked and restored. Each of the last four
fails if what it is about did not happen.

Prints, per path, p50 of client TTFT, the median of sum/client and of client - sum in milliseconds (what lies outside the
gateway's clock: connection, kernel, the server's parser, the client itself), and the share of `wire`, which is what no
worker's clock explains. Exit code 1 if a median ratio is off by more than 5 %.
"""

import argparse
import json
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any  # Any: JSON

from services.worker.model.make import make_model
from tests.support.clients import ready, until
from tests.support.processes import Cluster, cluster

_MOST_OFF = 0.05
_WARM_UP = 5
_SHORT_TOKENS, _LONG_TOKENS = 32, 900
_SMALL = "2MiB"  # of KV: 512 tokens of `mini`, too few for a long prompt
Prompt = list[int]
Row = dict[str, float]


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


def ask(connection: socket.socket, prompt: Prompt, max_tokens: int = 3) -> Seen:
    """From the first byte sent to the first chunk heard: a client library's own milliseconds are no part of serving."""
    fields = {
        "model": "m",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
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


def connect(url: str) -> socket.socket:
    """A kept connection."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def measure(url: str, prompts: Sequence[Prompt]) -> list[Seen]:
    """In turn, the first few for warming up only."""
    with connect(url) as connection:
        return [ask(connection, prompt) for prompt in prompts][_WARM_UP:]


def summary(seen: list[Seen]) -> Row:
    """Medians."""
    return {
        "client_p50_ms": round(statistics.median(one.client_ms for one in seen), 2),
        "sum_to_client": round(statistics.median(one.ratio for one in seen), 4),
        "gap_ms": round(statistics.median(one.client_ms - sum(one.phases_ms.values()) for one in seen), 2),
        "wire_share": round(statistics.median(one.phases_ms["wire"] / one.client_ms for one in seen), 4),
        "cached_tokens": statistics.median(one.cached_tokens for one in seen),
    }


@dataclass(frozen=True, slots=True)
class Bench:
    """What all paths share."""

    model: Path
    requests: int
    rng: random.Random = field(default_factory=lambda: random.Random(5))

    def fresh(self, tokens: int) -> list[Prompt]:
        """Prompts that nobody has seen, those for warming up included."""
        return [[self.rng.randrange(8, 1500) for _ in range(tokens)] for _ in range(self.requests + _WARM_UP)]

    @contextmanager
    def system(self, *workers: str, gateway: Mapping[str, Any], **flags: Any) -> Iterator[tuple[Cluster, str]]:
        """A running system, and its gateway's address. `workers`: names, such as prefill-0."""
        with tempfile.TemporaryDirectory(prefix="penstock-bench-") as temporary, cluster(Path(temporary)) as processes:
            for name in workers:
                self.start(processes, name, **flags)
            processes.start("gateway", "gateway-0", model=self.model, served_model_name="m", port=0, **gateway)
            processes.await_members("gateway-0", *workers)
            url = processes.members()["gateway-0"].endpoint
            until(lambda: ready(url), "ready")
            yield processes, url

    def start(self, processes: Cluster, name: str, **flags: Any) -> None:
        """A worker, or a KV store. `flags`: of all workers; those under its own name are its alone."""
        role = name.partition("-")[0]
        if role == "kvstore":
            processes.start(role, name, host_memory="512MiB")
            return
        own = {"model": self.model, "served_model_name": "m", "device_memory": "256MiB", **flags}
        own |= own.pop(name, {})
        processes.start(role, name, **{key: value for key, value in own.items() if not isinstance(value, dict)})


def plain(bench: Bench, *workers: str, local_prefill_tokens: int = 0, **flags: Any) -> dict[str, Row]:
    """Short, long and cached prompts."""
    with bench.system(*workers, gateway={"local_prefill_tokens": local_prefill_tokens}, **flags) as (_, url):
        long = bench.fresh(_LONG_TOKENS)
        return {
            "short": summary(measure(url, bench.fresh(_SHORT_TOKENS))),
            "long": summary(measure(url, long)),
            "long, cached": summary(measure(url, [long[-1]] * len(long))),
        }


def fetched(bench: Bench) -> dict[str, Row]:
    """The same prompts again, after the prefill worker's memory has gone with it."""
    flags = {"fetch": "always", "caching": 1, "spill": "write-through"}
    with bench.system("kvstore-0", "prefill-0", "decode-0", gateway={}, **flags) as (processes, url):
        prompts = bench.fresh(_LONG_TOKENS)
        measure(url, prompts)
        before = processes.members()
        processes.stop("prefill-0")
        bench.start(processes, "prefill-0", **flags)
        processes.await_members("prefill-0", besides=before)
        until(lambda: ready(url), "ready")
        row = summary(measure(url, prompts))
        if row["cached_tokens"] < _LONG_TOKENS - 32:
            raise SystemExit(f"nothing was fetched: {row}")
        return {"long": row}


def retried(bench: Bench) -> dict[str, Row]:
    """Of two prefill workers one sends wrong bytes: requests that met it first."""
    faulty = {"prefill-0": {"debug_faults": "true", "faults": "transfer: corrupt"}}
    workers, flags = ("prefill-0", "prefill-1", "decode-0"), {"verify_kv": "true", **faulty}
    with bench.system(*workers, gateway={"route_prefill": "round-robin"}, **flags) as (_, url):
        found = {}
        for kind, tokens in (("short", _SHORT_TOKENS), ("long", _LONG_TOKENS)):
            seen = [one for one in measure(url, bench.fresh(tokens)) if one.phases_ms["retries"] > 0]
            if not seen:
                raise SystemExit("nothing was tried again")
            found[kind] = summary(seen)
        return found


def streamed(bench: Bench) -> dict[str, Row]:
    """The prefill worker has no room for all layers of a prompt."""
    small = {"prefill-0": {"device_memory": _SMALL, "layer_offload": "auto"}}
    with bench.system("prefill-0", "decode-0", gateway={}, caching=0, **small) as (_, url):
        row = summary(measure(url, bench.fresh(_LONG_TOKENS)))
        require(url, "layerwise_prompts_total")
        return {"long": row}


def parked(bench: Bench) -> dict[str, Row]:
    """Two long answers at a time need more room than there is: they are parked, and restored."""
    flags = {"device_memory": _SMALL, "host_buffer": "16MiB", "caching": 0}
    with bench.system("mixed-0", gateway={}, **flags) as (_, url):
        over = threading.Event()

        def keep_asking(prompt: Prompt) -> None:
            with connect(url) as connection:
                while not over.is_set():
                    ask(connection, prompt, max_tokens=200)

        others = [threading.Thread(target=keep_asking, args=(prompt,)) for prompt in bench.fresh(200)[:2]]
        for thread in others:
            thread.start()
        try:
            row = summary(measure(url, bench.fresh(_SHORT_TOKENS)))
        finally:
            over.set()
            for thread in others:
                thread.join()
        require(url, "restored_total")
        return {"short": row}


def require(url: str, counter: str) -> None:
    """Ends the program if no worker has counted anything under a name that holds `counter`."""
    with urllib.request.urlopen(f"{url}/metrics") as page:
        lines = [line for line in page.read().decode().splitlines() if counter in line and not line.startswith("#")]
    if not any(float(line.rpartition(" ")[2]) > 0 for line in lines):
        raise SystemExit(f"it never happened: {counter} is {lines}")


SYSTEMS: dict[str, Callable[[Bench], dict[str, Row]]] = {
    "handed over, shared memory": lambda bench: plain(bench, "prefill-0", "decode-0"),
    "handed over, tcp": lambda bench: plain(bench, "prefill-0", "decode-0", transport="tcp"),
    "local on the decode worker": lambda bench: plain(bench, "prefill-0", "decode-0", local_prefill_tokens=64),
    "mixed": lambda bench: plain(bench, "mixed-0"),
    "fetched from a KV store": fetched,
    "retried": retried,
    "layer streams": streamed,
    "mixed, others parked": parked,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; exit code 1 if a sum is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--preset", default="mini", help="of `penstock make-model`")
    parser.add_argument("--only", default="", help="paths that have this in their name")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    found: dict[str, Row] = {}
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as temporary:
        bench = Bench(make_model(options.preset, Path(temporary) / "model"), options.requests)
        for name, path in SYSTEMS.items():
            if options.only not in name:
                continue
            for kind, row in path(bench).items():
                found[f"{name}, {kind}"] = row
                print(f"{name + ', ' + kind:42}", *(f"{key}={value:g}" for key, value in row.items()), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(abs(row["sum_to_client"] - 1) <= _MOST_OFF for row in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
