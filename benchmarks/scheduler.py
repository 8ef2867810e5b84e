"""MemServe's scheduler experiment at our scale: TTFT of every routing rule, 3 prefill workers and 1 decode worker, real processes.

    python -m benchmarks.scheduler [--rate 6] [--requests 250] [--rules session predicted-time ...] [--rounds 1] [--json FILE]

80 sessions ask about 27 documents (three sessions a document, MemServe section 7), 250 requests arrive by a Poisson process
and respect the turns of a session: a turn that comes while the one before is answered waits, and its time counts from when
it is sent. One system serves all rules, chosen per request by header; every run has a cache salt of its own, so no run finds
what another left. `+fetch`: through a gateway that lets workers fetch prefixes from each other; the others may not. `limited`: a prefill worker has room for about 9 documents.

The paper has one device a worker; here 3 prefill workers, 1 decode worker, the gateway and the clients share the cores, so
a prompt that is computed twice slows everybody. Compare rules with each other, not with the paper's milliseconds.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from common.kv_layout import KvLayout
from common.policy.routing_rules import RULES
from services.worker.model.make import PRESETS, make_model
from tests.support.clients import status, until
from tests.support.processes import cluster

SESSIONS, DOCUMENTS = 80, 27
DOCUMENT_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 1_500, 40, 8
LIMITED_DOCUMENTS = 9
UNLIMITED = "2GiB"
TARGET = 0.6
START_S = 240.0
_SHAPE = PRESETS["mini"].shape
FETCH = "+fetch"
GATEWAYS = {"gateway-0": "off", "gateway-1": "auto"}
"""Name -> --peer-fetch."""
CHOICES = (*RULES, f"least-load{FETCH}", f"predicted-time{FETCH}")
PREFILL = ("prefill-0", "prefill-1", "prefill-2")


@dataclass(frozen=True, slots=True)
class Row:
    """One rule in one run."""

    cache: str
    rule: str
    requests: int
    mean_ms: float
    p50_ms: float
    p99_ms: float
    hit_share: float
    errors: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to come."""

    at_s: float
    session: int
    question: tuple[int, ...]


def arrivals(rng: random.Random, requests: int, rate: float) -> list[Arrival]:
    """Poisson arrivals of sessions drawn at random."""
    at_s, found = 0.0, []
    for _ in range(requests):
        at_s += rng.expovariate(rate)
        question = tuple(rng.randrange(8, 1500) for _ in range(QUESTION_TOKENS))
        found.append(Arrival(at_s, rng.randrange(SESSIONS), question))
    return found


class Run:
    """All requests of one rule against a running system."""

    def __init__(self, url: str, rule: str, salt: str) -> None:
        self._url, self._name, self._salt = url, rule, salt
        self._rule = rule.removesuffix(FETCH)
        rng = random.Random(1)
        self._documents = [[rng.randrange(8, 1500) for _ in range(DOCUMENT_TOKENS)] for _ in range(DOCUMENTS)]
        self._histories: dict[int, list[int]] = {}
        self._turns = [asyncio.Lock() for _ in range(SESSIONS)]
        self.ttfts_ms: list[float] = []
        self.prompt_tokens = self.cached_tokens = self.errors = 0

    async def play(self, plan: Sequence[Arrival]) -> None:
        """Open loop: nobody waits for anything but the turn before."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._url, timeout=300, limits=limits) as client:
            began_s = time.monotonic()
            async with asyncio.TaskGroup() as group:
                for one in plan:
                    await asyncio.sleep(max(0.0, began_s + one.at_s - time.monotonic()))
                    group.create_task(self._ask(client, one))

    async def _ask(self, client: httpx.AsyncClient, one: Arrival) -> None:
        async with self._turns[one.session]:
            history = self._histories.setdefault(one.session, list(self._documents[one.session % DOCUMENTS]))
            prompt = [*history, *one.question]
            body = {
                "model": "m",
                "prompt": prompt,
                "max_tokens": ANSWER_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "return_token_ids": True,
                "cache_salt": self._salt,
            }
            headers = {"x-penstock-route-prefill": self._rule, "x-session-id": f"{self._salt}/{one.session}"}
            answer: list[int] = []
            sent_s, first_s = time.perf_counter(), None
            async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    first_s = first_s or time.perf_counter()
                    event = json.loads(line.removeprefix("data: "))
                    answer += [token for choice in event.get("choices", ()) for token in choice["token_ids"]]
                    if usage := event.get("usage"):
                        self.prompt_tokens += usage["prompt_tokens"]
                        self.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
            if first_s is None or len(answer) != ANSWER_TOKENS:
                self.errors += 1
                return
            self.ttfts_ms.append((first_s - sent_s) * 1e3)
            self._histories[one.session] = [*prompt, *answer]

    def row(self, cache: str) -> Row:
        """What came of it."""
        ordered = sorted(self.ttfts_ms)
        return Row(
            cache=cache,
            rule=self._name,
            requests=len(ordered),
            mean_ms=statistics.fmean(ordered),
            p50_ms=statistics.median(ordered),
            p99_ms=ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
            hit_share=self.cached_tokens / max(1, self.prompt_tokens),
            errors=self.errors,
        )


def limited_bytes() -> int:
    """Memory for LIMITED_DOCUMENTS documents with their conversations."""
    layout = KvLayout(
        layers=_SHAPE["num_hidden_layers"],
        kv_heads=_SHAPE["num_key_value_heads"],
        head_dim=_SHAPE["head_dim"],
        dtype="float32",
    )
    tokens = LIMITED_DOCUMENTS * (DOCUMENT_TOKENS + 4 * (QUESTION_TOKENS + ANSWER_TOKENS))
    return layout.pages_for(tokens) * layout.page_bytes


def measure(model: Path, cache: str, options: argparse.Namespace) -> list[Row]:
    """Every rule on one system with that much cache."""
    memory = UNLIMITED if cache == "unlimited" else str(limited_bytes())
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as logs, cluster(Path(logs)) as processes:
        common = {"model": model, "served_model_name": "m", "kvstore": "off"}
        processes.start("decode", "decode-0", device_memory=UNLIMITED, **common)
        for name in PREFILL:
            processes.start("prefill", name, device_memory=memory, **common)
        for name, fetch in GATEWAYS.items():
            processes.start("gateway", name, model=model, served_model_name="m", port=0, peer_fetch=fetch)
        processes.await_members(*GATEWAYS, "decode-0", *PREFILL, timeout_s=START_S)
        url, fetching = (processes.members()[name].endpoint for name in GATEWAYS)
        for gateway in (url, fetching):
            until(lambda gateway=gateway: _connected(gateway), "everybody is connected", timeout_s=START_S)  # type: ignore[misc]
        asyncio.run(Run(url, "round-robin", "warm-up").play(arrivals(random.Random(9), 60, 10.0)))  # costs and links
        for round_ in range(options.rounds):
            plan = arrivals(random.Random(options.seed + round_), options.requests, options.rate)
            for rule in options.rules:
                run = Run(fetching if rule.endswith(FETCH) else url, rule, f"{cache}/{rule}/{round_}")
                asyncio.run(run.play(plan))
                rows.append(run.row(cache))
                print(_line(rows[-1], None), flush=True)
    return rows


def _connected(url: str) -> bool:
    workers = status(url)
    names = (*PREFILL, "decode-0")
    ready = all(name in workers and workers[name]["state"] == "ready" for name in names)
    return ready and all(len(workers[name]["transports"]) >= len(PREFILL) for name in PREFILL)


def _line(row: Row, base: Row | None) -> str:
    ratio = "" if base is None else f"{row.p50_ms / base.p50_ms:8.2f} {row.p99_ms / base.p99_ms:8.2f}"
    return (
        f"{row.cache:10} {row.rule:20} {row.mean_ms:9.0f} {row.p50_ms:9.0f} {row.p99_ms:9.0f} "
        f"{row.hit_share:6.2f} {row.errors:6} {ratio}"
    )


def _median_rows(rows: Sequence[Row]) -> list[Row]:
    """One row per cache and rule: medians over the rounds."""
    found: list[Row] = []
    for cache, rule in dict.fromkeys((row.cache, row.rule) for row in rows):
        mine = [row for row in rows if (row.cache, row.rule) == (cache, rule)]
        found.append(
            Row(
                cache=cache,
                rule=rule,
                requests=sum(row.requests for row in mine),
                mean_ms=statistics.median(row.mean_ms for row in mine),
                p50_ms=statistics.median(row.p50_ms for row in mine),
                p99_ms=statistics.median(row.p99_ms for row in mine),
                hit_share=statistics.median(row.hit_share for row in mine),
                errors=sum(row.errors for row in mine),
            )
        )
    return found


def main(argv: Sequence[str]) -> int:
    """Print a table, and write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=6.0, help="requests per second")
    parser.add_argument("--requests", type=int, default=250)
    parser.add_argument("--rules", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--caches", nargs="+", choices=("unlimited", "limited"), default=["unlimited", "limited"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(argv)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_model("mini", Path(folder) / "model", family="llama")
        for cache in options.caches:
            rows += measure(model, cache, options)
    print(
        f"\n{'cache':10} {'rule':20} {'mean ms':>9} {'P50 ms':>9} {'P99 ms':>9} {'hits':>6} {'errors':>6} P50 and P99 over session"
    )
    summary = _median_rows(rows)
    for row in summary:
        print(_line(row, next((r for r in summary if (r.cache, r.rule) == (row.cache, "session")), None)))
    print(f"aim under load: P99 of predicted-time over session <= {TARGET} (MemServe: 0.41)")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
