"""Whole answers per second through one gateway process, beside the router of SGLang, and what each costs the process.

    python -m benchmarks.gateway_throughput [--sglang-python PATH] [--rounds 5] [--seconds 5] [--connections 32] [--json FILE]

Two workers that answer at once with one token; `wrk` (apt-get install wrk) asks over kept-alive connections, not streamed,
with prompts of 16 prefixes and many tails. PATH is a Python with the sglang-router wheel: `python3 -m venv S && S/bin/pip
install sglang-router`; it routes with its policy cache_aware. Both get the same bodies, in turn, in one run.

They do not do the same. Ours reads and checks every field, tokenises, names the prompt's blocks, predicts and charges, speaks
MessagePack to workers, turns tokens into text and writes the answer. The router looks the text up in a tree of characters
and passes bytes of HTTP on, both ways; its workers (servers of HTTP) would do the rest.
"""

import argparse
import contextlib
import json
import multiprocessing
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Event
from pathlib import Path

import psutil

from benchmarks.gateway_stream import PATIENCE_S
from common.ids import Incarnation, WorkerId, peer_id
from common.messages.liveness import Hello, Member, PageCounts, Ping, QueueCounts, Report, Welcome
from common.messages.requests import Generate, TokenDelta, Tokens
from common.net.redis import Membership
from common.net.sockets import Exchange
from common.ports import free_port
from tests.gateway.model import NAME, identity, write_model
from tests.support.redis import redis_server

CLUSTER, N_WORKERS = "gateway-throughput", 2
CONTEXT_TOKENS = 4_096
PREFIXES, BODIES = 16, 4_000
PROMPTS = {"short": (48, 16), "long": (448, 64)}
"""Name -> tokens of the shared prefix and of the tail; a character is a token."""
_ROOT = Path(__file__).parents[1]
_SCRIPT = """
local requests, at = {}, 0
function init(args)
  for line in io.lines(args[1]) do
    requests[#requests + 1] = wrk.format("POST", "/v1/completions", {["content-type"] = "application/json"}, line)
  end
end
function request()
  at = at % #requests + 1
  return requests[at]
end
"""


@dataclass(frozen=True)
class Round:
    """One run of the load."""

    who: str
    prompts: str
    requests_per_s: float
    cpu_us: float
    """Of the gateway's or router's process, per request."""
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Server:
    """Who is asked."""

    who: str
    port: int
    process: psutil.Process

    def cpu_s(self) -> float:
        times = [one.cpu_times() for one in (self.process, *self.process.children(recursive=True))]
        return float(sum(one.user + one.system for one in times))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sglang-python", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if shutil.which("wrk") is None:
        print("skipped: there is no wrk in PATH (apt-get install wrk)")
        return 0
    with tempfile.TemporaryDirectory(prefix="penstock-throughput-") as folder, contextlib.ExitStack() as stack:
        load = Load(Path(folder), options.connections, options.seconds)
        servers = [stack.enter_context(ours(Path(folder)))]
        if options.sglang_python is None:
            print("the peer was skipped: --sglang-python names no Python with sglang-router")
        else:
            servers.append(stack.enter_context(theirs(options.sglang_python)))
        for server in servers:
            load.run(server, "long")  # warm
        rounds = [load.run(s, prompts) for _ in range(options.rounds) for prompts in PROMPTS for s in servers]
    ratios = show(rounds)
    if options.json is not None:
        options.json.write_text(json.dumps({"rounds": [asdict(one) for one in rounds], "ratios": ratios}, indent=1))
    return 0


class Load:
    """wrk and what it asks; everybody is asked the same."""

    def __init__(self, folder: Path, connections: int, seconds: float) -> None:
        self._folder, self._connections, self._seconds = folder, connections, seconds
        (folder / "load.lua").write_text(_SCRIPT)
        for name, (prefix, tail) in PROMPTS.items():
            (folder / f"{name}.jsonl").write_text("\n".join(bodies(prefix, tail)) + "\n")

    def run(self, server: Server, prompts: str) -> Round:
        """Raises RuntimeError if an answer is an error."""
        command = [
            *("wrk", "-t1", f"-c{self._connections}", f"-d{self._seconds:g}s", "--latency"),
            *("-s", str(self._folder / "load.lua"), f"http://127.0.0.1:{server.port}", "--"),
            str(self._folder / f"{prompts}.jsonl"),
        ]
        before_s = server.cpu_s()
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=self._seconds + PATIENCE_S)
        cpu_s, text = server.cpu_s() - before_s, answer.stdout
        if "Non-2xx" in text or "Socket errors" in text:
            raise RuntimeError(f"{server.who} failed requests:\n{text}")
        n_requests = int(_found(r"(\d+) requests in", text))
        rate = float(_found(r"Requests/sec:\s+([\d.]+)", text))
        p50_ms, p99_ms = (_milliseconds(_found(rf"{share}%\s+([\d.]+\w+)", text)) for share in (50, 99))
        return Round(server.who, prompts, rate, cpu_s / n_requests * 1e6, p50_ms, p99_ms)


def bodies(prefix_tokens: int, tail_tokens: int) -> list[str]:
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz     "
    prefixes = ["".join(rng.choices(letters, k=prefix_tokens)) for _ in range(PREFIXES)]
    prompts = [rng.choice(prefixes) + "".join(rng.choices(letters, k=tail_tokens)) for _ in range(BODIES)]
    return [json.dumps({"model": NAME, "prompt": prompt, "max_tokens": 1}) for prompt in prompts]


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"wrk said something else than expected:\n{text}")
    return found[1]


def _milliseconds(text: str) -> float:
    for unit, factor in (("us", 1e-3), ("ms", 1.0), ("s", 1e3)):
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    raise RuntimeError(f"{text!r} is no time")


# -- ours


@contextlib.contextmanager
def ours(folder: Path) -> Iterator[Server]:
    """Redis, two workers, one gateway."""
    model = write_model(folder / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT_TOKENS}))
    context = multiprocessing.get_context("spawn")
    stopping = context.Event()
    with redis_server() as url:
        workers = [context.Process(target=run_worker, args=(url, f"mixed-{n}", stopping)) for n in range(N_WORKERS)]
        for worker in workers:
            worker.start()
        flags = ["--model", str(model), "--served-model-name", NAME, "--redis", url, "--cluster", CLUSTER]
        command = [sys.executable, "-m", "gateway", *flags, "--port", "0"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None, "it was asked for"
            listening = next(json.loads(line) for line in process.stderr if '"listening"' in line)
            port = int(listening["url"].rpartition(":")[2])
            wait_until_answers(port, "/status", b'"mixed-1"')
            wait_until_answers(port, "/ready", b"")
            yield Server("penstock", port, psutil.Process(process.pid))
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE_S)
            stopping.set()
            for worker in workers:
                worker.join(timeout=PATIENCE_S)


def run_worker(url: str, name: str, stopping: Event) -> None:
    """A mixed worker that knows one answer."""
    worker, incarnation = WorkerId(name), Incarnation(1)
    exchange = Exchange(peer_id(worker, incarnation), "tcp://127.0.0.1:0")
    member = Member(
        id=worker,
        role="mixed",
        incarnation=incarnation,
        endpoint=exchange.endpoint,
        host="",
        pid=0,
        model=identity(context_tokens=CONTEXT_TOKENS),
    )
    membership = Membership(url, CLUSTER, member, lambda members: None)
    membership.join()
    while not stopping.is_set():
        for sender, message, _ in exchange.receive(50.0):
            if isinstance(message, Generate):
                exchange.send(sender, Tokens(deltas=(TokenDelta(message.request, 0, (97,), "length"),)))
            elif isinstance(message, Hello):
                exchange.send(sender, Welcome(member=member))
            elif isinstance(message, Ping):
                exchange.send(
                    sender,
                    Report(
                        worker=member.id,
                        role=member.role,
                        incarnation=incarnation,
                        sequence=message.sequence,
                        pages=PageCounts(),
                        queue=QueueCounts(),
                    ),
                )
    membership.stop()
    exchange.close()


# -- theirs


@contextlib.contextmanager
def theirs(python: Path) -> Iterator[Server]:
    """Two HTTP workers and the router."""
    ports = [free_port() for _ in range(N_WORKERS + 2)]  # the router takes numbers only
    port, metrics_port, worker_ports = ports[0], ports[1], ports[2:]
    workers = [
        subprocess.Popen([sys.executable, "-m", "benchmarks._http_worker", str(one)], cwd=_ROOT) for one in worker_ports
    ]
    urls = [f"http://127.0.0.1:{one}" for one in worker_ports]
    command = [
        *(str(python), "-m", "sglang_router.launch_router", "--policy", "cache_aware", "--log-level", "error"),
        *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics_port), "--worker-urls", *urls),
    ]
    router: subprocess.Popen[bytes] | None = None
    try:
        for one in worker_ports:
            wait_until_answers(one, "/health", b"")
        router = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until_answers(port, "/readiness", b"")
        yield Server("sglang-router", port, psutil.Process(router.pid))
    finally:
        for process in (*([router] if router is not None else []), *workers):
            process.terminate()
            process.wait(timeout=PATIENCE_S)


def wait_until_answers(port: int, path: str, part: bytes) -> None:
    """Raises RuntimeError if it never does."""
    end_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < end_s:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=1.0) as response:
                if response.status == 200 and part in response.read():
                    return
        except OSError:
            pass  # not yet
        time.sleep(0.05)
    raise RuntimeError(f"nothing answers {path} at port {port}")


def show(rounds: Sequence[Round]) -> dict[str, float]:
    """Medians, and ratios of what ran side by side."""
    print(
        f"\n{'':16}{'prompts':8}{'requests/s':>11}  {'(lowest..highest)':<20}{'CPU us/request':>15}{'P50 ms':>8}{'P99 ms':>8}"
    )
    medians: dict[tuple[str, str], dict[str, float]] = {}
    for who in dict.fromkeys(one.who for one in rounds):
        for prompts in PROMPTS:
            mine = [asdict(one) for one in rounds if (one.who, one.prompts) == (who, prompts)]
            keys = ("requests_per_s", "cpu_us", "p50_ms", "p99_ms")
            found = medians[who, prompts] = {key: statistics.median(one[key] for one in mine) for key in keys}
            rates = [one["requests_per_s"] for one in mine]
            print(
                f"{who:16}{prompts:8}{found['requests_per_s']:11.0f}  {f'({min(rates):.0f}..{max(rates):.0f})':<20}"
                f"{found['cpu_us']:15.0f}{found['p50_ms']:8.2f}{found['p99_ms']:8.2f}"
            )
    peers = {who for who, _ in medians} - {"penstock"}
    ratios = {
        f"{prompts}: {key}, ours over theirs": medians["penstock", prompts][key] / medians[peer, prompts][key]
        for peer in peers
        for prompts in PROMPTS
        for key in ("requests_per_s", "cpu_us", "p50_ms", "p99_ms")
    }
    print("\n" + "\n".join(f"{name:45} {value:.2f}" for name, value in ratios.items()))
    print(
        "ours reads, checks and tokenises every prompt, names its blocks, predicts and charges, and writes the answer from "
        "tokens;\ntheirs looks the text up and passes bytes on: its HTTP workers would do that work"
    )
    return ratios


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
