"""A conversation of 6 turns at every caching level: prompt tokens computed per turn, and the time to the first token.

    python -m benchmarks.multi_turn [--preset tiny|small] [--conversations 3] [--json FILE]

A real system per level: gateway, prefill and decode worker, no KV store; only the public HTTP API is used. A turn's prompt is
the whole conversation so far in token ids: 400 of a system prompt, then 40 of the user and 60 of the answer per turn.
Computed tokens are counted twice, by the answers' usage and by the prefill worker's metrics: unless both agree in every turn,
nothing is reported. TTFT is a ratio to the same turn at level 0 of the same run.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks._serving import Serving, serving
from services.worker.model.make import PRESETS, make_model

SYSTEM_TOKENS, USER_TOKENS, ANSWER_TOKENS, TURNS = 400, 40, 60, 6
BLOCK_TOKENS = 16
LEVELS = (0, 1, 2, 3)
_COMPUTED = "penstock_worker_computed_tokens_total"
_HITS = "penstock_worker_hit_tokens_total"


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer."""

    prompt_tokens: int
    prefilled_tokens: int
    ttft_ms: float


def most_prefilled(level: int, turn: int) -> int:
    """The most prompt tokens that a turn (from 0) may compute. Rounding to whole blocks gives two blocks of slack."""
    prompt_tokens = SYSTEM_TOKENS + turn * (USER_TOKENS + ANSWER_TOKENS) + USER_TOKENS
    if level == 0 or turn == 0:
        return prompt_tokens
    new_tokens = USER_TOKENS if level == 3 else USER_TOKENS + ANSWER_TOKENS
    return new_tokens + 2 * BLOCK_TOKENS


def converse(system: Serving, rng: random.Random, turns: int, think_ms: float) -> list[Turn]:
    """One conversation; the user waits `think_ms` between turns. Raises SystemExit if usage and metrics tell different stories."""
    conversation = [rng.randrange(8, 1500) for _ in range(SYSTEM_TOKENS)]
    found: list[Turn] = []
    for _ in range(turns):
        conversation += [rng.randrange(8, 1500) for _ in range(USER_TOKENS)]
        computed, hits = system.total(_COMPUTED, worker="prefill-0"), system.total(_HITS, worker="prefill-0")
        answer = system.ask(conversation, ANSWER_TOKENS)
        computed_now = system.await_total(_COMPUTED, computed + answer.prefilled_tokens, worker="prefill-0")
        hits_now = system.total(_HITS, worker="prefill-0")
        if (computed_now - computed, hits_now - hits) != (answer.prefilled_tokens, answer.cached_tokens):
            raise SystemExit(
                f"a prompt of {answer.prompt_tokens} tokens: usage says {answer.prefilled_tokens} computed and "
                f"{answer.cached_tokens} cached, metrics {computed_now - computed:g} and {hits_now - hits:g}"
            )
        time.sleep(think_ms / 1e3)
        found.append(Turn(answer.prompt_tokens, answer.prefilled_tokens, answer.ttft_ms))
        conversation += answer.tokens
    return found


def run_level(folder: Path, model: Path, level: int, options: argparse.Namespace) -> list[list[Turn]]:
    """All conversations at one level; a first one warms up and is not counted."""
    flags = {
        "caching": level,
        "device": options.device,
        "device_memory": options.device_memory,
        "threads": options.threads,
    }
    rng = random.Random(6)
    with serving(folder / f"level-{level}", model, {"decode": flags, "prefill": flags}) as system:
        converse(system, rng, 2, options.think_ms)
        found = []
        for number in range(options.conversations):
            found.append(converse(system, rng, options.turns, options.think_ms))
            print(f"level {level}: conversation {number + 1} of {options.conversations} done", file=sys.stderr)
        return found


def report(levels: dict[int, list[list[Turn]]]) -> list[dict[str, float]]:
    """One row per level and turn."""
    rows: list[dict[str, float]] = []
    for level, conversations in levels.items():
        for index, same_turn in enumerate(zip(*conversations, strict=True)):
            ttft_ms = statistics.median(turn.ttft_ms for turn in same_turn)
            rows.append(
                {
                    "level": level,
                    "turn": index + 1,
                    "prompt_tokens": same_turn[0].prompt_tokens,
                    "prefilled_tokens": max(turn.prefilled_tokens for turn in same_turn),
                    "most_prefilled_tokens": most_prefilled(level, index),
                    "ttft_ms": ttft_ms,
                }
            )
    return rows


def show(rows: Sequence[dict[str, float]]) -> None:
    """The table for people."""
    base = {row["turn"]: row["ttft_ms"] for row in rows if row["level"] == 0}
    print(f"{'level':>5} {'turn':>4} {'prompt':>6} {'prefilled':>9} {'allowed':>7} {'TTFT ms':>8} {'of level 0':>10}")
    for row in rows:
        ratio = f"{row['ttft_ms'] / base[row['turn']]:10.2f}" if base else f"{'-':>10}"
        print(
            f"{row['level']:5} {row['turn']:4} {row['prompt_tokens']:6} {row['prefilled_tokens']:9} "
            f"{row['most_prefilled_tokens']:7} {row['ttft_ms']:8.1f} {ratio}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; exit code 1 if a turn computed more than its level allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--levels", type=int, nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--conversations", type=int, default=3)
    parser.add_argument("--think-ms", type=float, default=200.0, help="what the user takes before the next turn")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--device-memory", default="256MiB")
    parser.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0)) // 2))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        model = make_model(options.preset, folder / options.preset)
        rows = report({level: run_level(folder, model, level, options) for level in options.levels})
    show(rows)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    over = [row for row in rows if row["prefilled_tokens"] > row["most_prefilled_tokens"]]
    for row in over:
        print(f"level {row['level']}, turn {row['turn']}: more prefilled than allowed", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
