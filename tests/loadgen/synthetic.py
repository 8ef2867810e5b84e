"""Runs that look like measured ones: a small queueing model of two prefill and two decode workers, seeded."""

from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadgen.results.health import generator_health
from loadgen.results.metrics import Slo, summarize
from loadgen.results.records import Outcome, RequestRecord
from loadgen.results.result import Result, RunFacts
from loadgen.results.timeline import LeakCheck, ServerSample, ServerView, WorkerSample
from loadgen.stats.saturation import Saturation

SLO = Slo(ttft_s=0.5, tpot_s=0.05)
ERRORS = (
    (Outcome.REJECTED, 503, "HTTP 503: no prefill worker is ready; retry later"),
    (Outcome.TIMEOUT, None, "no end within 30 s, after 12 chunks"),
    (Outcome.CUT, 200, "the stream ended after 7 chunks without [DONE] <script>alert(1)</script>"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is asked of a run."""

    rate: float = 8.0
    n_requests: int = 400
    seed: int = 1
    ms_per_prompt_token: float = 0.22
    turns: int = 4
    failures: float = 0.02
    told: bool = True
    """The server tells phases, workers, cached tokens and samples."""
    cluster: str = "2P2D"


def run(shape: Shape = Shape()) -> Result:
    """One run."""
    rng = np.random.default_rng(shape.seed)
    sent_s = np.cumsum(rng.exponential(1 / shape.rate, shape.n_requests))
    free_s = {"prefill-0": 0.0, "prefill-1": 0.0}
    records = [_request(shape, rng, index, float(at_s), free_s) for index, at_s in enumerate(sent_s)]
    summary = summarize(records, SLO)
    saturated = shape.rate * shape.ms_per_prompt_token > 3.0
    why = "the number in flight grew by 3.1 per second, 95 % sure above 0" if saturated else "no growth"
    return Result(
        _facts(shape),
        summary,
        generator_health(records, 1 / shape.rate, cpu_s=(0.21 * summary.duration_s,), wall_s=summary.duration_s),
        records,
        _server(records, summary.duration_s) if shape.told else ServerView(source="no /status and no /metrics there"),
        Saturation(detected=saturated, why=why),
    )


def sweep(rates: tuple[float, ...] = (2, 4, 6, 8, 10, 14), **changes: Any) -> list[Result]:
    """A run per rate."""
    return [run(Shape(rate=rate, seed=seed, **changes)) for seed, rate in enumerate(rates)]


def _request(
    shape: Shape, rng: np.random.Generator, index: int, sent_s: float, free_s: dict[str, float]
) -> RequestRecord:
    conversation, turn = divmod(index, shape.turns)
    prompt = int(np.clip(rng.lognormal(6.1, 0.7), 60, 6000)) + 260 * turn
    cached = int((0.0 if turn == 0 else 0.75 * rng.beta(8, 2)) * prompt) // 16 * 16
    worker = min(free_s, key=lambda name: free_s[name])
    queue_ms = max(0.0, free_s[worker] - sent_s) * 1e3
    compute_ms = 12 + (prompt - cached) * shape.ms_per_prompt_token
    grant_ms, transfer_ms, decode_ms = rng.exponential(3.0), 4 + prompt * 0.012, rng.exponential(5.0)
    free_s[worker] = max(free_s[worker], sent_s) + compute_ms / 1e3
    first_s = sent_s + (queue_ms + grant_ms + compute_ms + transfer_ms + decode_ms + 4 + rng.exponential(2.5)) / 1e3
    n_tokens = int(rng.integers(20, 160))
    step_s = 0.018 + 0.0022 * shape.rate
    gaps_s = step_s * rng.lognormal(0, 0.18, n_tokens - 1) + (rng.random(n_tokens - 1) < 0.01) * 0.08
    chunk_s = np.concatenate(([first_s], first_s + np.cumsum(gaps_s)))
    outcome, status, detail = Outcome.OK, 200, ""
    if rng.random() < shape.failures:
        outcome, status, detail = ERRORS[int(rng.integers(len(ERRORS)))]
        chunk_s = chunk_s[: {Outcome.REJECTED: 0, Outcome.TIMEOUT: 12, Outcome.CUT: 7}[outcome]]
    planned_s = sent_s - float(rng.exponential(0.0006))
    phases = {"prefill_queue": queue_ms, "grant_wait": grant_ms, "compute": compute_ms, "transfer": transfer_ms}
    told = shape.told and outcome is Outcome.OK
    return RequestRecord(
        index=index,
        request_id=f"bench-1-{index}",
        conversation=conversation,
        turn=turn,
        group=("chat", "document")[conversation % 2],
        planned_s=planned_s,
        sent_s=sent_s,
        end_s=float(chunk_s[-1]) + 0.001 if len(chunk_s) else sent_s + 0.02,
        outcome=outcome,
        detail=detail,
        http_status=status,
        asked_input_tokens=prompt,
        asked_output_tokens=n_tokens,
        input_tokens=prompt,
        output_tokens=len(chunk_s),
        counted_by="usage" if outcome is Outcome.OK else "token_ids",
        cached_tokens=cached if told else None,
        finish_reason="length" if outcome is Outcome.OK else None,
        workers={"prefill": worker, "decode": f"decode-{index % 2}"} if told else {},
        phases_ms={name: float(ms) for name, ms in (phases | {"decode_queue": decode_ms}).items()} if told else {},
        chunk_s=array("d", chunk_s.tolist()),
        chunk_tokens=array("l", [1] * len(chunk_s)),
    )


def _server(records: list[RequestRecord], duration_s: float) -> ServerView:
    samples = []
    for at_s in np.arange(0, duration_s, 0.5).tolist():
        held: dict[str, list[int]] = {f"{role}-{i}": [0, 0, 0] for role in ("prefill", "decode") for i in (0, 1)}
        for record in records:
            if not record.sent_s <= at_s < record.end_s or not record.workers:
                continue
            first_s = record.chunk_s[0]
            computing_s = first_s - (record.phases_ms["compute"] + record.phases_ms["transfer"]) / 1e3
            role = "prefill" if at_s < first_s else "decode"
            counts = held[record.workers[role]]
            counts[0 if at_s < computing_s else 1] += 1
            counts[2] += record.prompt_tokens
        workers = {
            name: WorkerSample(
                role=name.partition("-")[0],
                waiting=waiting,
                running=running,
                kv_used=min(1.0, tokens / 40_000),
                kv_cached=min(0.9, at_s / 100) if name.startswith("prefill") else 0.0,
            )
            for name, (waiting, running, tokens) in held.items()
        }
        sample = ServerSample(
            at_s=at_s,
            waiting=sum(worker.waiting for worker in workers.values()),
            running=sum(worker.running for worker in workers.values()),
            kv_used=sum(worker.kv_used for worker in workers.values()) / len(workers),
            workers=workers,
            memory=_memory(workers, at_s),
        )
        samples.append(sample)
    status = {"workers": [{"name": name, "state": "ready"} for name in ("prefill-0", "decode-0")]}
    return ServerView(
        source="/status",
        samples=tuple(samples),
        before=status,
        after=status,
        leak_check=LeakCheck(held={"decode-1: pages": (0.0, 3.0)}, waited_s=5.0),
    )


def _memory(workers: dict[str, WorkerSample], at_s: float) -> dict[str, dict[str, dict[str, int]]]:
    """Pools of 2 GiB next to 600 MB of weights, a KV store of 1 GiB that fills up."""
    found = {}
    for name, worker in workers.items():
        requests, prefix = int(worker.kv_used * 2**30), int(worker.kv_cached * 2**30)
        parts = {"weights": 600_000_000, "activations": 2**27 * worker.running // 8, "kv_requests": requests}
        found[name] = {"device": parts | {"kv_prefix": prefix, "kv_free": 2**31 - requests - prefix, "released": 0}}
    stored = int(min(0.8, at_s / 60) * 2**30)
    found["kvstore-0"] = {"host": {"cached": stored, "free": 2**30 - stored}, "disk": {"cached": stored // 2}}
    return found


def _facts(shape: Shape) -> RunFacts:
    return RunFacts(
        date="2026-03-01T12:00:00+00:00",
        command=("penstock", "bench", "run", "--rate", f"{shape.rate:g}", "--cluster", shape.cluster),
        url="http://127.0.0.1:8000",
        endpoint="completions",
        model="Qwen/Qwen3-0.6B",
        num_prompts=shape.n_requests,
        request_rate=shape.rate,
        arrival="poisson",
        burstiness=1.0,
        max_concurrency=None,
        seed=shape.seed,
        settings={
            "rate": shape.rate,
            "arrival": "poisson",
            "num_requests": shape.n_requests,
            "dataset": "multi-turn",
            "turns": shape.turns,
            "cluster": shape.cluster,
            "goodput": {"ttft_s": SLO.ttft_s, "tpot_s": SLO.tpot_s, "e2e_s": None},
            "isl": "lognormal:512:900",
        },
        host={"name": "laptop", "cores": 8, "python": "3.11.9"},
    )
