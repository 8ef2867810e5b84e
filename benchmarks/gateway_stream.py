"""Streamed tokens per second through one gateway process, what each costs it, and what it adds to the first token.

    python -m benchmarks.gateway_stream [--streams 32] [--tokens 256] [--seconds 6] [--json FILE]

A real gateway process, between clients in this process and a mixed worker without a model in another. The worker gives
every running request one token per step. Paced: steps at a fixed rate, so that nothing queues and every token is a
chunk of its own. Flat out: steps as fast as the worker can; a gateway that is behind puts several tokens in a chunk.
Added to TTFT: time from sending a request to its first token, through the gateway less straight to the worker.
"""

import argparse
import asyncio
import json
import multiprocessing
import re
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.synchronize import Event
from pathlib import Path

import psutil

from common.ids import Incarnation, PeerId, RequestId, WorkerId, peer_id
from common.messages.liveness import Hello, Member, PageCounts, Ping, QueueCounts, Report, Welcome
from common.messages.requests import Cancel, Generate, Sampling, TokenDelta, Tokens
from common.net.redis import Membership, Registry
from common.net.sockets import Exchange
from tests.gateway.model import NAME, identity, write_model
from tests.support.redis import redis_server

CLUSTER = "gateway-stream"
PATIENCE_S = 30.0
WARM_S = 1.0
TARGET_TOKENS_PER_S, TARGET_ADDED_MS = 3_000, 5.0

_TEXT = re.compile(rb'"text":"(a+)"')


@dataclass(frozen=True)
class Throughput:
    """One run with all streams open."""

    mode: str
    offered_tokens_per_s: float | None
    tokens_per_s: float
    tokens_per_chunk: float
    gateway_cpu_us_per_token: float


@dataclass(frozen=True)
class FirstToken:
    """Medians over single requests, one at a time."""

    direct_ms: float
    gateway_ms: float
    added_ms: float


@dataclass
class _Running:
    gateway: PeerId
    position: int
    left: int


def run_worker(url: str, step_ms: float, stopping: Event) -> None:
    """A mixed worker: token 97 for everybody, each step. `step_ms` 0: no pause."""
    exchange, member = _worker_member()
    membership = Membership(url, CLUSTER, member, lambda members: None)
    membership.join()
    running: dict[RequestId, _Running] = {}
    next_step_s = time.monotonic()
    while not stopping.is_set():
        pause_ms = max(0.0, (next_step_s - time.monotonic()) * 1000) if running else 50.0
        for sender, message, _ in exchange.receive(pause_ms):
            if isinstance(message, Hello):
                exchange.send(sender, Welcome(member=member))
            elif isinstance(message, Ping):
                exchange.send(sender, _report(member, message.sequence))
            elif isinstance(message, Generate):
                running[message.request] = _Running(sender, 1, message.sampling.max_tokens - 1)
                _send_first(exchange, sender, message)
            elif isinstance(message, Cancel):
                running.pop(message.request, None)
        if time.monotonic() >= next_step_s:
            next_step_s = max(next_step_s + step_ms / 1000, time.monotonic() - 0.1)
            _step(exchange, running)
    membership.stop()
    exchange.close()


def _worker_member() -> tuple[Exchange, Member]:
    worker, incarnation = WorkerId("mixed-0"), Incarnation(secrets.randbits(64))
    exchange = Exchange(peer_id(worker, incarnation), "tcp://127.0.0.1:0")
    member = Member(
        id=worker,
        role="mixed",
        incarnation=incarnation,
        endpoint=exchange.endpoint,
        host="",
        pid=0,
        model=identity(context_tokens=10**6),
    )
    return exchange, member


def _send_first(exchange: Exchange, gateway: PeerId, generate: Generate) -> None:
    finish = "length" if generate.sampling.max_tokens == 1 else None
    exchange.send(gateway, Tokens(deltas=(TokenDelta(generate.request, 0, (97,), finish),)))


def _step(exchange: Exchange, running: dict[RequestId, _Running]) -> None:
    by_gateway: dict[PeerId, list[TokenDelta]] = {}
    for request, one in list(running.items()):
        if one.left <= 0:
            del running[request]
            continue
        one.left -= 1
        finish = "length" if one.left == 0 else None
        by_gateway.setdefault(one.gateway, []).append(TokenDelta(request, one.position, (97,), finish))
        one.position += 1
    for gateway, deltas in by_gateway.items():
        exchange.send(gateway, Tokens(deltas=tuple(deltas)))


def _report(member: Member, sequence: int) -> Report:
    return Report(
        worker=member.id,
        role=member.role,
        incarnation=member.incarnation,
        sequence=sequence,
        pages=PageCounts(),
        queue=QueueCounts(),
    )


def _request(max_tokens: int) -> bytes:
    body = json.dumps({"model": NAME, "prompt": "benchmark", "max_tokens": max_tokens, "stream": True}).encode()
    return b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body


@dataclass
class _Seen:
    """What all clients together have received."""

    tokens: int = 0
    chunks: int = 0


async def _stream(port: int, max_tokens: int, seen: _Seen) -> None:
    """One streamed answer. Every token is the letter a, so that the text's length counts them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_request(max_tokens))
    rest = b""
    whole = b""
    while b"[DONE]" not in whole:
        part = await reader.read(1 << 16)
        if not part:
            raise RuntimeError(f"the stream broke: {rest!r}")
        whole, _, rest = (rest + part).rpartition(b"\n\n")
        texts = _TEXT.findall(whole)
        seen.chunks += len(texts)
        seen.tokens += sum(map(len, texts))
    writer.close()


async def _throughput(
    port: int, gateway: psutil.Process, streams: int, tokens: int, seconds: float
) -> tuple[float, float, float]:
    """Tokens per second, tokens per chunk, CPU microseconds per token; counted in a window of a longer run."""
    seen = _Seen()

    async def client() -> None:
        while True:
            await _stream(port, tokens, seen)

    async with asyncio.TaskGroup() as group:
        clients = [group.create_task(client()) for _ in range(streams)]
        await asyncio.sleep(WARM_S)
        first, before, start_s = replace(seen), gateway.cpu_times(), time.monotonic()
        await asyncio.sleep(seconds)
        n_tokens, n_chunks = seen.tokens - first.tokens, seen.chunks - first.chunks
        after, took_s = gateway.cpu_times(), time.monotonic() - start_s
        for one in clients:
            one.cancel()
    cpu_s = after.user + after.system - before.user - before.system
    return n_tokens / took_s, n_tokens / n_chunks, cpu_s / n_tokens * 1e6


async def _first_token_ms(port: int, rounds: int) -> float:
    found = []
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(rounds):
        start_s = time.perf_counter()
        writer.write(_request(1))
        seen = await reader.readuntil(b'"text":')
        found.append((time.perf_counter() - start_s) * 1000)
        while b"0\r\n\r\n" not in seen:
            seen = seen[-8:] + await reader.read(1 << 16)
    writer.close()
    return statistics.median(found)


def _direct_first_token_ms(url: str, rounds: int) -> float:
    """The same, as a gateway would: one Exchange dialling the worker."""
    registry = Registry(url, CLUSTER)
    worker = next(member for member in registry.members() if member.role == "mixed")
    registry.close()
    this = Member(id=WorkerId("direct"), role="gateway", incarnation=Incarnation(1), endpoint="", host="", pid=0)
    exchange, to = Exchange(peer_id(this.id, this.incarnation), None), peer_id(worker.id, worker.incarnation)
    exchange.dial(to, worker.endpoint)
    exchange.send(to, Hello(member=this))
    exchange.receive(1000)
    found = []
    for number in range(rounds):
        request = RequestId(f"direct-{number}")
        start_s = time.perf_counter()
        exchange.send(to, Generate(request=request, prompt=(1,) * 9, sampling=Sampling(max_tokens=1), timeout_ms=1000))
        exchange.receive(1000)
        found.append((time.perf_counter() - start_s) * 1000)
    exchange.close()
    return statistics.median(found)


def _wait_ready(port: int) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < end_s:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready") as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError("the gateway did not get ready")


class Cluster:
    """Redis's address, one worker process, one gateway process; a context manager."""

    def __init__(self, redis_url: str, model: Path, step_ms: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._stopping = context.Event()
        self._worker = context.Process(target=run_worker, args=(redis_url, step_ms, self._stopping))
        flags = ["--model", str(model), "--served-model-name", NAME, "--redis", redis_url, "--cluster", CLUSTER]
        self._command = [sys.executable, "-m", "gateway", *flags, "--port", "0"]

    def __enter__(self) -> "Cluster":
        self._worker.start()
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        listening = next(json.loads(line) for line in self._process.stderr if '"listening"' in line)
        self.port = int(listening["url"].rpartition(":")[2])
        self.gateway = psutil.Process(self._process.pid)
        _wait_ready(self.port)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate(timeout=PATIENCE_S)
        self._stopping.set()
        self._worker.join(timeout=PATIENCE_S)


def main(argv: Sequence[str]) -> int:
    """Print a table, and write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256, help="per answer")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each run")
    parser.add_argument(
        "--rates", type=float, nargs="*", default=[3200.0, 6400.0], help="paced runs: tokens per second"
    )
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(argv)
    rows: list[Throughput] = []
    with redis_server() as url, tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "letters")
        for rate in (*options.rates, None):
            step_ms = 0.0 if rate is None else 1000 * options.streams / rate
            with Cluster(url, model, step_ms) as one:
                run = _throughput(one.port, one.gateway, options.streams, options.tokens, options.seconds)
                rows.append(Throughput("flat out" if rate is None else "paced", rate, *asyncio.run(run)))
        with Cluster(url, model, 0.0) as one:
            through = asyncio.run(_first_token_ms(one.port, 300))
            direct = _direct_first_token_ms(url, 300)
    first = FirstToken(direct, through, through - direct)
    print(f"{'mode':10} {'offered/s':>10} {'tokens/s':>10} {'per chunk':>10} {'gateway CPU us/token':>22}")
    for row in rows:
        offered = "-" if row.offered_tokens_per_s is None else f"{row.offered_tokens_per_s:.0f}"
        print(
            f"{row.mode:10} {offered:>10} {row.tokens_per_s:10.0f} {row.tokens_per_chunk:10.2f} "
            f"{row.gateway_cpu_us_per_token:22.1f}"
        )
    print(
        f"TTFT p50: {first.gateway_ms:.2f} ms through the gateway, {first.direct_ms:.2f} ms straight to the worker, "
        f"{first.added_ms:.2f} ms added (target <= {TARGET_ADDED_MS:g}); target of tokens/s >= {TARGET_TOKENS_PER_S}"
    )
    if options.json is not None:
        options.json.write_text(
            json.dumps({"throughput": [asdict(row) for row in rows], "ttft": asdict(first)}, indent=1)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
