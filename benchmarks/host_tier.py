"""Device memory too small for the prompts in use: what the KV store's host memory gives back.

    python -m benchmarks.host_tier [--lengths 256 512 1024 2048 4096] [--rounds 3] [--json FILE]

Two questions, both through the public HTTP API of a real system (gateway, prefill, decode, KV store).
Hit rate (tiny model): more prompts than fit into device memory are asked in turn, with the host tier and without; the share
of prompt tokens that were not computed, after the first cycle. Time to the first token (0.5B shape): one prompt is asked
again after new ones of its length took its place in device memory, against those new ones; the ratio of the medians. A hit
counts only if the prefill worker's metrics say that all of it came from host memory.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks._serving import Answer, Serving, serving
from common.kv_layout import KvLayout
from services.worker.model.make import PRESETS, make_model

BLOCK_TOKENS = 16
ANSWER_TOKENS = 2
LENGTHS = (256, 512, 1024, 2048, 4096)
_CHUNK_BYTES = 2**21
_HOST_HITS = {"name": "penstock_worker_hit_tokens_total", "worker": "prefill-0", "tier": "host"}


def block_bytes(preset: str, dtype: str) -> int:
    """KV of 16 tokens."""
    shape = PRESETS[preset].shape
    layout = KvLayout(
        layers=shape["num_hidden_layers"],
        kv_heads=shape["num_key_value_heads"],
        head_dim=shape["hidden_size"] // shape["num_attention_heads"],
        dtype=dtype,
        block_tokens=BLOCK_TOKENS,
    )
    return layout.layers * layout.page_bytes


def pool_bytes(preset: str, dtype: str, tokens: int) -> int:
    """A budget that holds so many tokens: whole blocks, rounded up to what pools are made of."""
    needed_bytes = -(-tokens // BLOCK_TOKENS) * block_bytes(preset, dtype)
    return -(-needed_bytes // _CHUNK_BYTES) * _CHUNK_BYTES


def prompt_of(rng: random.Random, tokens: int) -> list[int]:
    """A prompt that shares no block with any other."""
    return [rng.randrange(8, 1500) for _ in range(tokens)]


def flags(options: argparse.Namespace, device_bytes: int) -> dict[str, dict[str, object]]:
    """Both workers' flags. The decode worker has room for itself: it is the prompts that must not fit."""
    common = {
        "caching": options.caching,
        "device": options.device,
        "dtype": options.dtype,
        "spill": options.spill,
        "threads": options.threads,
    }
    return {
        "decode": {**common, "device_memory": "512MiB"},
        "prefill": {**common, "device_memory": device_bytes},
    }


def hit_rate(system: Serving, prompts: Sequence[list[int]], cycles: int) -> float:
    """Cached share of the prompt tokens of all cycles but the first."""
    answers: list[Answer] = []
    for cycle in range(cycles):
        for prompt in prompts:
            answer = system.ask(prompt, ANSWER_TOKENS)
            if cycle:
                answers.append(answer)
    return sum(one.cached_tokens for one in answers) / sum(one.prompt_tokens for one in answers)


def measure_hit_rates(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """With and without the host tier, at a working set that is twice as large as device memory."""
    tokens = options.hit_rate_length
    model = make_model("tiny", folder / "tiny")
    device_bytes = pool_bytes("tiny", "float32", 16 * tokens)
    n_prompts = -(-2 * device_bytes // (tokens // BLOCK_TOKENS * block_bytes("tiny", "float32")))
    prompts = [prompt_of(random.Random(number), tokens) for number in range(n_prompts)]
    result: dict[str, float] = {"prompts": n_prompts, "device_memory_bytes": device_bytes}
    for name, store in (("off", None), ("on", {"host_memory": 4 * device_bytes})):
        tiny = argparse.Namespace(**{**vars(options), "dtype": "float32"})
        with serving(folder / f"rate-{name}", model, flags(tiny, device_bytes), store) as system:
            result[f"hit_rate_{name}"] = hit_rate(system, prompts, options.rounds)
            result[f"host_hit_tokens_{name}"] = system.total(**_HOST_HITS)
        print(f"host tier {name}: hit rate {result[f'hit_rate_{name}']:.2f}", file=sys.stderr)
    return result


def measure_ttft(folder: Path, model: Path, tokens: int, options: argparse.Namespace) -> dict[str, float]:
    """One length: a prompt from host memory against a new one, in turn. Raises SystemExit if a hit was none."""
    rng = random.Random(tokens)
    device_bytes = pool_bytes(options.preset, options.dtype, tokens + 2 * BLOCK_TOKENS)
    host_bytes = pool_bytes(options.preset, options.dtype, 2 * (options.rounds + 1) * (tokens + 2 * BLOCK_TOKENS))
    known = prompt_of(rng, tokens)
    hits_ms: list[float] = []
    new_ms: list[float] = []
    store: dict[str, object] = {"host_memory": host_bytes, "dtype": options.dtype}
    with serving(folder / f"ttft-{tokens}", model, flags(options, device_bytes), store) as system:
        system.ask(known, ANSWER_TOKENS)
        for _ in range(options.rounds):
            # The second takes what the first left: blocks go one by one, so that one prompt alone may not push out all.
            new = [system.ask(prompt_of(rng, tokens), ANSWER_TOKENS) for _ in range(2)]
            before = system.total(**_HOST_HITS)
            hit = system.ask(known, ANSWER_TOKENS)
            from_host = system.await_total(expected=before + hit.cached_tokens, **_HOST_HITS) - before
            new_cached = sum(one.cached_tokens for one in new)
            if new_cached or from_host != hit.cached_tokens or hit.prefilled_tokens > BLOCK_TOKENS:
                raise SystemExit(
                    f"{tokens} tokens: new prompts had {new_cached} cached, the known one {hit.cached_tokens}, "
                    f"of which {from_host:g} from host memory; more is needed for a comparison"
                )
            hits_ms.append(hit.ttft_ms)
            new_ms += [one.ttft_ms for one in new]
    hit_ms, recomputed_ms = statistics.median(hits_ms), statistics.median(new_ms)
    print(f"{tokens} tokens: {hit_ms:.1f} of {recomputed_ms:.1f} ms", file=sys.stderr)
    return {"tokens": tokens, "hit_ms": hit_ms, "recompute_ms": recomputed_ms, "ratio": hit_ms / recomputed_ms}


def crossover(rows: Sequence[dict[str, float]]) -> str:
    """From which length on fetching is faster than computing."""
    slower = [row["tokens"] for row in rows if row["ratio"] >= 1]
    if not slower:
        return f"fetching is faster at every length from {rows[0]['tokens']:g} tokens on; the crossover lies below"
    faster = [row["tokens"] for row in rows if row["tokens"] > max(slower)]
    if not faster:
        return f"fetching is not faster at {max(slower):g} tokens; the crossover lies above"
    return f"the crossover lies between {max(slower):g} and {min(faster):g} tokens"


def main(argv: Sequence[str] | None = None) -> int:
    """Print both tables; exit code 1 if the host tier does not raise the hit rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small", help="of the TTFT part")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the TTFT part")
    parser.add_argument("--lengths", type=int, nargs="*", default=list(LENGTHS), help="none: only the hit rate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hit-rate-length", type=int, default=256)
    parser.add_argument("--caching", type=int, choices=(1, 2, 3), default=3)
    parser.add_argument("--spill", choices=("write-through", "write-back", "selective"), default="write-through")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0)) // 2))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: must be 2 or more, the first cycle only fills the caches")
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        rates = measure_hit_rates(folder, options)
        model = make_model(options.preset, folder / "model") if options.lengths else folder
        rows = [measure_ttft(folder, model, tokens, options) for tokens in sorted(options.lengths)]
    for name, value in rates.items():
        print(f"{name:24} {value:12.2f}")
    if rows:
        print(f"{'tokens':>8} {'host hit ms':>12} {'recompute ms':>13} {'ratio':>6}")
        for row in rows:
            print(f"{row['tokens']:8} {row['hit_ms']:12.1f} {row['recompute_ms']:13.1f} {row['ratio']:6.2f}")
        print(crossover(rows))
    if options.json is not None:
        options.json.write_text(json.dumps({"hit_rate": rates, "ttft": rows}, indent=1) + "\n")
    return 0 if rates["hit_rate_on"] > rates["hit_rate_off"] else 1


if __name__ == "__main__":
    sys.exit(main())
