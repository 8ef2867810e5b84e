"""The other half of the prompt_tree benchmark: the radix tree of the ai-dynamo-runtime wheel, run by a Python that has it.

    DYNAMO_PYTHON -m benchmarks._dynamo_radix TOTAL_BLOCKS WORKERS PROMPT_BLOCKS ROUNDS

Prints one line of JSON. A name is an integer of its first 8 bytes there.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dynamo.llm import RadixTree

from benchmarks._prompt_chains import load


def main(total_blocks: int, workers: int, prompt_blocks: int, rounds: int) -> None:
    work = load(total_blocks, workers, prompt_blocks, rounds)
    events = [
        (worker, event(number, prompt))
        for worker, prompts in enumerate(work.held)
        for number, prompt in enumerate(prompts)
    ]
    n_blocks = sum(len(prompt) for prompts in work.held for prompt in prompts)
    tree, before_bytes = RadixTree(), resident_bytes()
    began_s = time.perf_counter()
    for worker, body in events:
        tree.apply_event(worker, body)
    tree.find_matches([0])  # answered after everything before it
    apply_s = time.perf_counter() - began_s
    tree_bytes = resident_bytes() - before_bytes
    spans_ns: dict[str, list[int]] = {}
    hit_blocks: dict[str, int] = {}
    for kind, prompts in work.asked.items():
        names = [numbers(prompt) for prompt in prompts]
        spans_ns[kind], hit_blocks[kind] = [], 0
        for one in names:
            began_ns = time.perf_counter_ns()
            scores = tree.find_matches(one).scores
            spans_ns[kind].append(time.perf_counter_ns() - began_ns)
            hit_blocks[kind] += sum(scores.values())
    answer = {
        "spans_ns": spans_ns,
        "hit_blocks": hit_blocks,
        "blocks_per_s": n_blocks / apply_s,
        "bytes_per_block": tree_bytes / n_blocks,
    }
    print(json.dumps(answer))


def numbers(prompt: Sequence[bytes]) -> list[int]:
    return [int.from_bytes(name[:8], "little") for name in prompt]


def event(number: int, prompt: Sequence[bytes]) -> bytes:
    blocks = [{"block_hash": one, "tokens_hash": one} for one in numbers(prompt)]
    return json.dumps({"event_id": number, "data": {"stored": {"parent_hash": None, "blocks": blocks}}}).encode()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]))
