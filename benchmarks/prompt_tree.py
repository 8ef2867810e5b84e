"""What a look into the global prompt tree costs, and how fast it takes news in, beside a radix tree written in Rust.

    python -m benchmarks.prompt_tree [--blocks 100000,1000000] [--workers 8] [--prompt-tokens 4096] [--rounds 2000]
                                     [--dynamo-python PATH] [--json FILE]

A look is `match` of one prompt and `held` for every worker, one call after the other, with names that are fresh objects. News
are decoded from MessagePack and applied in the gateway's slices; Redis is not in it. PATH is a Python with the
ai-dynamo-runtime wheel: `python3 -m venv D && D/bin/pip install ai-dynamo-runtime`. Its tree gets the same chains in a process
of its own in the same run, as JSON, which is what its binding takes; its look is one `find_matches`. Its hits must be ours.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from benchmarks._prompt_chains import KINDS, Load, load, pieces
from common.block_hash import HASH_BYTES, BlockHash, hash_blocks
from common.ids import PeerId
from common.messages.cache_events import CacheBatch, CacheEvent, CacheSnapshot
from gateway.core.prompt_tree import PromptTree

BLOCK_TOKENS = 16
TARGET_MATCH_US, TARGET_FLAT, TARGET_BLOCKS_PER_S = 100.0, 1.5, 50_000.0
SLICE_EVENTS, ENTRY_EVENTS = 1_000, 500  # as in gateway/tree_keeper.py and common/net/cache_events.py
VOCAB_TOKENS = 150_000


@dataclass(frozen=True)
class Span:
    """Microseconds of one call."""

    p50_us: float
    p99_us: float


@dataclass(frozen=True)
class Row:
    """One tree of one size."""

    who: str
    total_blocks: int
    looks: dict[str, Span]
    hit_blocks: dict[str, int]
    """Kind -> leading blocks, summed over prompts and workers."""
    blocks_per_s: float
    worst_slice_ms: float | None
    bytes_per_block: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default="100000,1000000")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--dynamo-python", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shape = (arguments.workers, arguments.prompt_tokens // BLOCK_TOKENS, arguments.rounds)
    rows, peers = [], []
    for total_blocks in map(int, arguments.blocks.split(",")):
        rows.append(ours(total_blocks, *shape))
        if arguments.dynamo_python is not None:
            peers.append(theirs(arguments.dynamo_python, total_blocks, *shape))
    hashing = hash_span(arguments.prompt_tokens, arguments.rounds)
    show(rows + peers, hashing)
    if not peers:
        print("\nthe peer was skipped: --dynamo-python names no Python with ai-dynamo-runtime")
    ratios, reached = judged(rows, peers)
    print("\n" + "\n".join(f"{name:58} {value:.2f}" for name, value in ratios.items()))
    print(
        f"targets: look p50 {TARGET_MATCH_US:.0f} us, flat within {TARGET_FLAT}, {TARGET_BLOCKS_PER_S:.0f} blocks/s; "
        f"{'reached' if reached else 'MISSED'}"
    )
    if arguments.json:
        body = {"rows": [asdict(row) for row in rows + peers], "hash": asdict(hashing), "ratios": ratios}
        arguments.json.write_text(json.dumps({**body, "reached": reached}, indent=2))
    return 0 if reached else 1


def ours(total_blocks: int, workers: int, prompt_blocks: int, rounds: int) -> Row:
    work = load(total_blocks, workers, prompt_blocks, rounds)
    peers = [PeerId(f"worker-{worker}@{worker:016x}") for worker in range(workers)]
    tree = PromptTree()
    for peer in peers:
        tree.put(CacheSnapshot(peer, 0, []))
    tree.apply_some(1, 0.0)
    blocks_per_s, worst_ms = absorbed(tree, peers, work)
    looks: dict[str, Span] = {}
    hit_blocks: dict[str, int] = {}
    for kind in KINDS:
        spans_ns: list[int] = []
        hit_blocks[kind] = 0
        for prompt in work.asked[kind]:
            names = [BlockHash(name) for name in prompt]
            began_ns = time.perf_counter_ns()
            match = tree.match(names)
            held = [match.held(peer, None) for peer in peers]
            spans_ns.append(time.perf_counter_ns() - began_ns)
            hit_blocks[kind] += sum(one.device for one in held)
        looks[kind] = span(spans_ns)
    tree.check()
    return Row("penstock", tree.blocks, looks, hit_blocks, blocks_per_s, worst_ms, tree_bytes(tree) / tree.blocks)


def absorbed(tree: PromptTree, peers: Sequence[PeerId], work: Load) -> tuple[float, float]:
    """Blocks per second, and the longest slice: decoding is done by another thread there, here it only counts."""
    encode, decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(tuple[CacheEvent, ...]).decode
    entries: list[tuple[PeerId, int, int, bytes]] = []
    for peer, prompts in zip(peers, work.held, strict=True):
        number = 0
        for prompt in prompts:
            for names in pieces(prompt, ENTRY_EVENTS):
                events = [CacheEvent(number + at, "stored", name, name, at) for at, name in enumerate(names, 1)]
                entries.append((peer, number + 1, number + len(names), encode(events)))
                number += len(names)
    random.Random(0).shuffle(peer_order := sorted({peer for peer, *_ in entries}))
    entries.sort(key=lambda entry: (entry[1], peer_order.index(entry[0])))  # workers write in turn
    n_blocks = sum(last - first + 1 for _, first, last, _ in entries)
    spent_s = worst_s = 0.0
    for peer, first, last, body in entries:
        began_s = time.perf_counter()
        tree.put(CacheBatch(peer, first, last, decode(body)))
        decoded_s = time.perf_counter()
        if tree.backlog_events >= SLICE_EVENTS or last == n_blocks:
            tree.apply_some(SLICE_EVENTS, 0.0)
        ended_s = time.perf_counter()
        spent_s, worst_s = spent_s + ended_s - began_s, max(worst_s, ended_s - decoded_s)
    began_s = time.perf_counter()
    while not tree.idle:
        tree.apply_some(SLICE_EVENTS, 0.0)
    return n_blocks / (spent_s + time.perf_counter() - began_s), worst_s * 1e3


def theirs(python: Path, total_blocks: int, workers: int, prompt_blocks: int, rounds: int) -> Row:
    command = [str(python), "-m", "benchmarks._dynamo_radix", *map(str, (total_blocks, workers, prompt_blocks, rounds))]
    root = Path(__file__).parents[1]
    answer = json.loads(subprocess.run(command, cwd=root, check=True, capture_output=True, timeout=600).stdout)
    looks = {kind: span(answer["spans_ns"][kind]) for kind in KINDS}
    return Row(
        "dynamo", total_blocks, looks, answer["hit_blocks"], answer["blocks_per_s"], None, answer["bytes_per_block"]
    )


def tree_bytes(tree: PromptTree) -> int:
    """Of the map's tables, and of the names that nobody else keeps."""
    shards = tree._masks.shards
    names = sum(len(shard) for shard in shards) * sys.getsizeof(bytes(HASH_BYTES))
    return sum(sys.getsizeof(shard) for shard in shards) + names


def hash_span(prompt_tokens: int, rounds: int) -> Span:
    rng, root = random.Random(0), BlockHash(bytes(HASH_BYTES))
    tokens = [rng.randrange(VOCAB_TOKENS) for _ in range(prompt_tokens)]
    spans_ns = []
    for _ in range(rounds):
        began_ns = time.perf_counter_ns()
        hash_blocks(tokens, root, BLOCK_TOKENS)
        spans_ns.append(time.perf_counter_ns() - began_ns)
    return span(spans_ns)


def span(spans_ns: Sequence[int]) -> Span:
    ranked = sorted(spans_ns)
    return Span(ranked[len(ranked) // 2] / 1e3, ranked[len(ranked) * 99 // 100] / 1e3)


def show(rows: Sequence[Row], hashing: Span) -> None:
    print("look, us: p50 (p99)")
    print(
        f"{'':10}{'blocks':>9}", *(f"{kind:>17}" for kind in KINDS), f"{'k blocks/s':>11}{'slice ms':>10}{'B/block':>9}"
    )
    for row in rows:
        cells = [f"{row.looks[kind].p50_us:.1f} ({row.looks[kind].p99_us:.1f})" for kind in KINDS]
        worst = "-" if row.worst_slice_ms is None else f"{row.worst_slice_ms:.2f}"
        print(
            f"{row.who:10}{row.total_blocks:9}",
            *(f"{cell:>17}" for cell in cells),
            f"{row.blocks_per_s / 1e3:11.0f}{worst:>10}{row.bytes_per_block:9.0f}",
        )
    print(f"naming the blocks of one prompt: {hashing.p50_us:.0f} ({hashing.p99_us:.0f}) us, once per request")


def judged(rows: Sequence[Row], peers: Sequence[Row]) -> tuple[dict[str, float], bool]:
    """Ratios of this run, and whether the targets hold."""
    ratios = {
        f"{kind}: look, largest tree over smallest": rows[-1].looks[kind].p50_us / rows[0].looks[kind].p50_us
        for kind in KINDS
    }
    reached = all(flat <= TARGET_FLAT for flat in ratios.values())
    reached &= all(row.looks[kind].p50_us <= TARGET_MATCH_US for row in rows for kind in KINDS)
    reached &= all(row.blocks_per_s >= TARGET_BLOCKS_PER_S for row in rows)
    for mine, other in zip(rows, peers, strict=False):
        if mine.hit_blocks != other.hit_blocks:
            raise RuntimeError(f"the trees disagree: {mine.hit_blocks} here, {other.hit_blocks} there")
        size = f"{mine.total_blocks} blocks"
        for kind in KINDS:
            ratios[f"{size}, {kind}: their look over ours"] = other.looks[kind].p50_us / mine.looks[kind].p50_us
        ratios[f"{size}: news taken in, ours over theirs"] = mine.blocks_per_s / other.blocks_per_s
        ratios[f"{size}: memory, theirs over ours"] = other.bytes_per_block / mine.bytes_per_block
    return ratios, reached


if __name__ == "__main__":
    sys.exit(main())
