"""Bandwidth of the hand-over copy over plain memcpy, in one run.

    python -m benchmarks.handover_copy [--prompt-tokens 1024] [--rounds 40] [--json FILE]

Two processes, as in service: one shares its page memory, the other maps it and its copier thread writes prompts there,
one job per layer and prefill chunk (`by layer`) or a few with all layers (`aggregated`). Measured from the first job posted to the last one done. Plain memcpy moves as many
bytes in one call between two ordinary buffers of one process. Both sides take turns and walk through more memory than any cache
holds; the fastest, least disturbed round of each is compared. `neighbours`: blocks as a pool with room gives them, the pages of one
layer of a block next to those of the next layer; `scattered`: blocks in random order.
"""

import argparse
import itertools
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from common.ids import PeerId, TransferId
from common.kv_layout import KvLayout
from common.messages.handover import KvSpan
from kvstore.memory.page_memory import open_page_memory
from kvstore.transport.block_jobs import PIECE_BYTES
from kvstore.transport.copier import Copier, CopyDone, CopyJob
from kvstore.transport.share import Share
from kvstore.transport.shared_pages import SharedPages
from kvstore.transport.shm import ShmChannel

TARGET_RATIO = 0.7
CHUNK_TOKENS = 512
WALKED_BYTES = 256 * 2**20
PREFILL, DECODE = PeerId("prefill@1"), PeerId("decode@1")
SHAPES = {
    "0.5B": KvLayout(layers=24, kv_heads=2, head_dim=64, dtype="bfloat16"),
    "8B": KvLayout(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16"),
}


@dataclass(frozen=True)
class Bandwidth:
    """Fastest of all rounds."""

    shape: str
    pieces: str
    blocks: str
    prompt_mib: float
    handover_gib_per_s: float
    memcpy_gib_per_s: float
    ratio: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [row for shape in SHAPES for row in measure(shape, SHAPES[shape], arguments.prompt_tokens, arguments.rounds)]
    print(f"{'shape':6} {'pieces':11} {'blocks':11} {'MiB/prompt':>10} {'hand-over':>12} {'memcpy':>12} {'ratio':>6}")
    for row in rows:
        speeds = f"{row.handover_gib_per_s:6.2f} GiB/s {row.memcpy_gib_per_s:6.2f} GiB/s"
        print(f"{row.shape:6} {row.pieces:11} {row.blocks:11} {row.prompt_mib:10.1f} {speeds} {row.ratio:6.2f}")
    reached = all(row.ratio >= TARGET_RATIO for row in rows if row.blocks == "neighbours")
    print(f"target for neighbours: {TARGET_RATIO}; {'reached' if reached else 'MISSED'}")
    if arguments.json:
        found = {"target_ratio": TARGET_RATIO, "reached": reached, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(found, indent=2))
    return 0 if reached else 1


def measure(shape: str, layout: KvLayout, prompt_tokens: int, rounds: int) -> list[Bandwidth]:
    prompt_pages = layout.pages_for(prompt_tokens)
    prompt_bytes = prompt_pages * layout.page_bytes
    prompts = max(2, WALKED_BYTES // prompt_bytes)
    budget_bytes = (prompts * prompt_bytes // 2**21 + 2) * 2**21
    plain = np.ones((2, prompts, prompt_bytes), np.uint8)
    found: list[Bandwidth] = []
    with tempfile.TemporaryDirectory() as run_dir, decode_process(budget_bytes, layout, run_dir) as path:
        link = Link(budget_bytes, layout, path)
        for pieces, order in itertools.product(("by layer", "aggregated"), ("neighbours", "scattered")):
            jobs = link.jobs(prompts, prompt_tokens, pieces, order)
            for one in range(prompts):  # touch everything once
                link.hand_over(jobs[one])
            link.require_equal(jobs)
            pairs: list[tuple[float, float]] = []
            for number in range(rounds):
                one = number % prompts
                began_s = time.perf_counter()
                np.copyto(plain[1, one], plain[0, one])
                plain_s = time.perf_counter() - began_s
                pairs.append((link.hand_over(jobs[one]), plain_s))
            gib = prompt_bytes / 2**30
            copied, plain_copied = (gib / min(side) for side in zip(*pairs, strict=True))
            found.append(
                Bandwidth(shape, pieces, order, prompt_bytes / 2**20, copied, plain_copied, copied / plain_copied)
            )
        link.close()
    return found


class Link:
    """The prefill side: local pages, the peer's pages, and the copier between them."""

    def __init__(self, budget_bytes: int, layout: KvLayout, path: str) -> None:
        self._layout = layout
        self._memory = open_page_memory(budget_bytes, layout)
        self._memory.pages.rows[:] = np.arange(self._memory.pages.n_pages, dtype=np.uint32)[:, None] % 251
        self._share = Share(PREFILL, on_joined=lambda peer: None, on_gone=lambda peer: None)
        target = self._share.connect(DECODE, path)
        assert isinstance(target, SharedPages)  # host memory has no other
        self._target = target
        self._ends: list[CopyDone] = []
        self._copier = Copier(self._ends.append)
        self._copier.attach(DECODE, ShmChannel(self._memory.pages.rows, self._target))

    def jobs(self, prompts: int, prompt_tokens: int, pieces: str, order: str) -> list[list[CopyJob]]:
        """Per prompt: one job per chunk and layer, in the order in which they are computed, or per chunk of whole blocks."""
        layout, n_blocks = self._layout, self._layout.blocks_for(prompt_tokens)
        sides = [list(range(prompts * n_blocks)) for _ in range(2)]
        if order == "scattered":
            for side, blocks in enumerate(sides):
                random.Random(side).shuffle(blocks)
        found: list[list[CopyJob]] = []
        for prompt in range(prompts):
            jobs: list[CopyJob] = []
            for span in spans(layout, n_blocks, pieces):
                low = prompt * n_blocks + span.first_block
                source, target = (
                    tuple(
                        block * layout.layers + layer
                        for block in blocks[low : low + span.n_blocks]
                        for layer in range(span.layer, span.layer + span.n_layers)
                    )
                    for blocks in sides
                )
                jobs.append(CopyJob(TransferId(str(prompt)), DECODE, span, source, target))
            found.append(jobs)
        return found

    def hand_over(self, jobs: list[CopyJob]) -> float:
        """Seconds from the first job posted to the last one done."""
        jobs = [fresh(job) for job in jobs]
        began_s = time.perf_counter()
        for job in jobs:
            self._copier.post(job)
        self._copier.drain(timeout_s=60)
        elapsed_s = time.perf_counter() - began_s
        failed = [end.error_text for end in self._ends if not end.ok]
        if failed or len(self._ends) != len(jobs):
            raise RuntimeError(f"{len(self._ends)} of {len(jobs)} copies ended, {len(failed)} badly: {failed[:1]}")
        self._ends.clear()
        return elapsed_s

    def require_equal(self, prompts: list[list[CopyJob]]) -> None:
        """Raise unless every page has arrived."""
        for job in (job for jobs in prompts for job in jobs):
            if not np.array_equal(self._target.read(job.target_pages), self._memory.pages.rows[list(job.source_pages)]):
                raise RuntimeError(f"{job.span} arrived with other bytes")

    def close(self) -> None:
        self._copier.stop()
        self._share.close()
        self._memory.close()


def spans(layout: KvLayout, n_blocks: int, pieces: str) -> list[KvSpan]:
    """What a prompt is copied in."""
    if pieces == "aggregated":
        step = max(1, PIECE_BYTES // layout.page_bytes // layout.layers)
        return [KvSpan(0, first, min(step, n_blocks - first), layout.layers) for first in range(0, n_blocks, step)]
    step = layout.blocks_for(CHUNK_TOKENS)
    return [
        KvSpan(layer, first, min(step, n_blocks - first))
        for first in range(0, n_blocks, step)
        for layer in range(layout.layers)
    ]


def fresh(job: CopyJob) -> CopyJob:
    """The same job, made anew: in service, page ids come from the page table and from the grant just then."""
    source, target = (tuple(np.array(pages).tolist()) for pages in (job.source_pages, job.target_pages))
    return replace(job, source_pages=source, target_pages=target)


@contextmanager
def decode_process(budget_bytes: int, layout: KvLayout, run_dir: str) -> Iterator[str]:
    """A process that shares its pages; yields its socket's path."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=serve, args=(theirs, budget_bytes, layout, run_dir), daemon=True)
    child.start()
    try:
        yield ours.recv()
        ours.send("done")
    finally:
        child.join(timeout=10)
        child.kill()


def serve(connection: Connection, budget_bytes: int, layout: KvLayout, run_dir: str) -> None:
    """The decode side: does nothing but share its pages."""
    memory = open_page_memory(budget_bytes, layout)
    share = Share(DECODE, on_joined=lambda peer: None, on_gone=lambda peer: None)
    connection.send(share.serve(memory, Path(run_dir)))
    connection.recv()
    share.close()
    memory.close()


if __name__ == "__main__":
    sys.exit(main())
