"""Long requests at once in one memory for KV and scratch: how many run together when scratch is set aside, and when it is lent.

    python -m benchmarks.elastic_memory [--prompt 3000] [--answer 100] [--requests 6] [--repeats 1] [--json FILE]

A real system per row: gateway and one mixed worker, over HTTP. --device-memory is what makes the arithmetic of eLLM (arXiv
2506.15155) come out for this model: workers take requests twice as long as those that come, and with the scratch of the longest
prompt set aside there is KV for one and a half. `whole` computes a prompt in one step, and so needs scratch for all its rows; `chunked` computes 256 rows at a time,
and so has nothing to lend: the gain must vanish there.

Batch: the most answers whose tokens came at the same time. Tokens per second: of all answers, from the first token of the first
to the last of the last. Prompts have no block in common.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks._serving import Answer, Serving, serving
from services.worker.engine.engine import TorchEngine
from services.worker.model.load import load_model
from services.worker.model.make import make_model

PRESET = "mini"
CHUNKED_ROWS = 256
HELD_REQUESTS = 1.6
"""Requests for which a pool has KV that sets the scratch of the longest prompt aside."""
CONTEXT_RATIO = 2
"""The longest request that the workers take, as a multiple of those that come: scratch is set aside for that one."""
MODES = ("static", "kv")


@dataclass(frozen=True, slots=True)
class Timed:
    """One answer, on the benchmark's clock."""

    first_s: float
    end_s: float
    ttft_ms: float


@dataclass(frozen=True, slots=True)
class Row:
    """All requests under one setting."""

    prefill: str
    elastic: str
    batch: int
    tokens_per_s: float
    ttft_mean_ms: float
    ttft_last_ms: float


def budget_bytes(model: Path, request_tokens: int) -> int:
    """What `--device-memory` must be."""
    context_tokens = CONTEXT_RATIO * request_tokens
    loaded = load_model(model)
    layout = loaded.layout
    pages = torch.zeros(1, 2, layout.block_tokens, layout.kv_heads, layout.head_dim, dtype=loaded.dtype)
    scratch_bytes = TorchEngine(loaded, pages, layout).scratch_terms.needs_bytes(context_tokens, context_tokens)
    request_bytes = layout.pages_for(request_tokens) * layout.page_bytes
    mib = 2**20
    print(
        f"scratch of the largest step {scratch_bytes / mib:.1f} MiB, KV of a request {request_bytes / mib:.1f} MiB",
        file=sys.stderr,
    )
    return int(scratch_bytes + HELD_REQUESTS * request_bytes)


def all_at_once(system: Serving, prompts: Sequence[list[int]], answer_tokens: int) -> list[Timed]:
    """Send every prompt now, and wait for all answers."""
    timed: list[Timed] = []

    def ask(prompt: list[int]) -> None:
        began_s = time.perf_counter()
        answer: Answer = system.ask(prompt, answer_tokens)
        timed.append(Timed(began_s + answer.ttft_ms / 1e3, time.perf_counter(), answer.ttft_ms))

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(timed) < len(prompts):
        raise SystemExit(f"{len(prompts) - len(timed)} of {len(prompts)} answers broke off")
    return timed


def most_at_once(timed: Sequence[Timed]) -> int:
    """The most answers between their first token and their last at any moment."""
    return max(sum(other.first_s <= one.first_s < other.end_s for other in timed) for one in timed)


def run(folder: Path, model: Path, prefill: str, mode: str, options: argparse.Namespace) -> Row:
    """One setting; a short request first, which is not counted."""
    context_tokens = CONTEXT_RATIO * (options.prompt + options.answer)
    flags = {
        "elastic": mode,
        "device_memory": options.budget_bytes,
        "max_context_tokens": context_tokens,
        "max_step_tokens": context_tokens if prefill == "whole" else CHUNKED_ROWS,
        "threads": options.threads,
        "caching": 0,
    }
    rng = random.Random(8)
    found: list[list[Timed]] = []
    with serving(folder / f"{prefill}-{mode}", model, {"mixed": flags}) as system:
        system.ask([rng.randrange(8, 1500) for _ in range(50)], 8)
        for _ in range(options.repeats):
            prompts = [[rng.randrange(8, 1500) for _ in range(options.prompt)] for _ in range(options.requests)]
            found.append(all_at_once(system, prompts, options.answer))
    return Row(
        prefill=prefill,
        elastic=mode,
        batch=max(map(most_at_once, found)),
        tokens_per_s=statistics.median(_tokens_per_s(timed, options.answer) for timed in found),
        ttft_mean_ms=statistics.median(statistics.mean(one.ttft_ms for one in timed) for timed in found),
        ttft_last_ms=statistics.median(max(one.ttft_ms for one in timed) for timed in found),
    )


def _tokens_per_s(timed: Sequence[Timed], answer_tokens: int) -> float:
    seconds = max(one.end_s for one in timed) - min(one.first_s for one in timed)
    return len(timed) * answer_tokens / seconds


def show(rows: Sequence[Row]) -> None:
    """The table for people."""
    print(f"{'prefill':>8} {'elastic':>8} {'batch':>6} {'tokens/s':>9} {'TTFT mean ms':>13} {'last ms':>9}")
    for row in rows:
        print(
            f"{row.prefill:>8} {row.elastic:>8} {row.batch:6} {row.tokens_per_s:9.1f} {row.ttft_mean_ms:13.0f} "
            f"{row.ttft_last_ms:9.0f}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=3000, help="tokens of each prompt")
    parser.add_argument("--answer", type=int, default=100, help="tokens of each answer")
    parser.add_argument("--requests", type=int, default=6, help="sent at once")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0)) // 2))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        model = make_model(PRESET, folder / PRESET)
        options.budget_bytes = budget_bytes(model, options.prompt + options.answer)
        rows = [run(folder, model, prefill, mode, options) for prefill in ("whole", "chunked") for mode in MODES]
    show(rows)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
