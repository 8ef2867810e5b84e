"""Sequence views: attention on them over gathering pages and over a loop of blocks, and what mapping costs, in one run.

    python -m benchmarks.virtual_tensors [--rounds 5] [--steps 400] [--json FILE]

One core, float32, 14 heads over 2 KV heads of 64: one layer of a decode step, one query per sequence, all of one length.
`view`: one call per sequence on the plain tensor that a view is. `gather`: blocks of 16 tokens are copied into one padded batch, which one
call reads, as the paged engine does. `blocks`: one call for each block of all sequences, partial results merged. Sides take
turns; medians of the core's time are compared. Then, on a virtual clock with what calls cost on one H200, a decode batch of a
Llama-3-8B shape (blocks of 512 tokens: 2 MiB a page; steps of 20 ms) whose sequences draw 128 to 1,024 tokens, end, and are
replaced by prompts of 512 to 4,096 tokens. Last, what mapping takes of this machine.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks._view_costs import StepCosts, Way, measure
from common.kv_layout import KvLayout
from kernels.merge import merge_partials
from kvstore.memory.page_memory import PageMemory, open_page_memory
from kvstore.memory.plan import HOST_LEAST_PAGE_BYTES, virtual_block_tokens
from kvstore.memory.sequence_views import SequenceViews

HEADS, KV_HEADS, HEAD_DIM = 14, 2, 64
SCALING = HEAD_DIM**-0.5
PAGED_BLOCK_TOKENS = 16
BATCHES, LENGTHS = (1, 4, 8, 16, 32), (256, 1024, 4096)
WAYS = (
    Way("when needed", None, 0.0),
    Way("when needed, half continue", None, 0.5),
    Way("ahead by 1", 1, 0.0),
    Way("ahead by 16", 16, 0.0),
    Way("ahead by 16, half continue", 16, 0.5),
)
_OWNERS_TOKENS = max(BATCHES) * max(LENGTHS)


@dataclass(frozen=True)
class Attention:
    """Milliseconds of one layer."""

    batch: int
    length: int
    view_ms: float
    gather_ms: float
    blocks_ms: float

    @property
    def over_gather(self) -> float:
        """How many times as long gathering takes."""
        return self.gather_ms / self.view_ms

    @property
    def over_blocks(self) -> float:
        """How many times as long the loop takes."""
        return self.blocks_ms / self.view_ms


@dataclass(frozen=True)
class HostCosts:
    """Microseconds for each page of 64 KiB."""

    map_us: float
    unmap_us: float
    first_read_us: float
    """Reading a page through its new mapping, less reading it again."""
    show_us: float
    """Of `show`, for a sequence of which nothing changed."""
    step_share: float
    """Mapping, first reads and `show` of one decode step of 32 sequences, over attention alone in all its layers."""


class Pages:
    """The same keys and values as pages in random order, behind a table and in views."""

    def __init__(self) -> None:
        block_tokens = virtual_block_tokens(KV_HEADS, HEAD_DIM, "float32", 4096, HOST_LEAST_PAGE_BYTES)
        self.layout = KvLayout(
            layers=1, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="float32", block_tokens=block_tokens
        )
        n_pages = _OWNERS_TOKENS // block_tokens
        self.memory: PageMemory = open_page_memory(n_pages * self.layout.page_bytes, self.layout, page_chunks=True)
        self.views = SequenceViews(
            self.memory.pages,
            n_slots=max(BATCHES),
            context_blocks=max(LENGTHS) // block_tokens,
            lock=self.memory.vm_lock,
        )
        generator = torch.Generator().manual_seed(0)
        rows = torch.from_numpy(self.memory.pages.rows).view(torch.float32)
        rows.normal_(generator=generator)
        self.order = torch.randperm(n_pages, generator=generator)
        small = n_pages * block_tokens // PAGED_BLOCK_TOKENS
        self.paged = rows.view(small, PAGED_BLOCK_TOKENS, 2, KV_HEADS, HEAD_DIM)

    def table(self, sequence: int, tokens: int) -> Tensor:
        """Views' pages of a sequence."""
        blocks = max(LENGTHS) // self.layout.block_tokens
        return self.order[sequence * blocks :][: tokens // self.layout.block_tokens]

    def close(self) -> None:
        self.views.close()
        self.memory.close()


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """query [batch, kv_heads, group, head_dim] over key, value [batch, keys, kv_heads, head_dim]."""
    found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key.transpose(1, 2), value.transpose(1, 2), 0.0, False, attn_mask=mask, scale=SCALING
    )
    return found


class Step:
    """One layer of a decode step, three ways."""

    def __init__(self, pages: Pages, batch: int, length: int) -> None:
        self.pages, self.batch, self.length = pages, batch, length
        self.query = torch.randn(batch, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
        tables = torch.stack([pages.table(sequence, length) for sequence in range(batch)])
        pages.views.begin_step(range(batch))
        slots = [pages.views.show(row, tables[row][None].numpy().astype(np.int32)) for row in range(batch)]
        self.slots = [slot for slot in slots if slot is not None]
        pages.views.end_step()
        smaller = pages.layout.block_tokens // PAGED_BLOCK_TOKENS
        self.small = (tables[:, :, None] * smaller + torch.arange(smaller)).view(batch, -1)
        self.flat = self.small.reshape(-1)
        self.gathered = torch.empty(batch * length // PAGED_BLOCK_TOKENS, *pages.paged.shape[1:])
        self.mask = torch.zeros(batch, 1, 1, length)

    def view(self) -> Tensor:
        views, outs = self.pages.views, list[Tensor]()
        shape, value_at = (1, self.length, KV_HEADS, HEAD_DIM), KV_HEADS * HEAD_DIM
        strides = (0, views.token_elements, HEAD_DIM, 1)
        for query, slot in zip(self.query.split(1), self.slots, strict=True):
            start = views.start(slot, 0)
            key = views.tensor.as_strided(shape, strides, start)
            outs.append(attend(query, key, views.tensor.as_strided(shape, strides, start + value_at))[0])
        return torch.cat(outs)

    def gather(self) -> Tensor:
        torch.index_select(self.pages.paged, 0, self.flat, out=self.gathered)
        both = self.gathered.view(self.batch, self.length, 2, KV_HEADS, HEAD_DIM)
        return attend(self.query, both[:, :, 0], both[:, :, 1], self.mask)[0]

    def blocks(self) -> Tensor:
        shape = (self.batch, HEADS, HEAD_DIM)
        merged: tuple[Tensor, Tensor] | None = None
        for block in range(self.small.shape[1]):
            both = self.pages.paged[self.small[:, block]]
            out, lse = attend(self.query, both[:, :, 0], both[:, :, 1])
            part = out.reshape(shape), lse.reshape(self.batch, HEADS)
            merged = part if merged is None else merge_partials(*merged, *part)
        assert merged is not None
        return merged[0].view(self.query.shape)


def timed_ms(call: Callable[[], object]) -> float:
    """Of this thread's core, the kernel's work for it included: whatever else the machine does costs less so."""
    began_s = time.thread_time()
    call()
    return (time.thread_time() - began_s) * 1e3


def attention(pages: Pages, batch: int, length: int, rounds: int) -> Attention:
    """Raises RuntimeError if the three do not agree."""
    step = Step(pages, batch, length)
    ways = (step.view, step.gather, step.blocks)
    expected = step.gather()
    for way in ways:
        if not torch.allclose(way(), expected, atol=1e-4):
            raise RuntimeError(f"{way.__name__} does not compute what gathering does")
    repeats = max(1, 20_000 // (batch * length))
    spans = [[timed_ms(lambda way=way: [way() for _ in range(repeats)]) for way in ways] for _ in range(rounds)]  # type: ignore[misc]  # bound now
    view_ms, gather_ms, blocks_ms = (statistics.median(column) / repeats for column in zip(*spans, strict=True))
    return Attention(batch, length, view_ms, gather_ms, blocks_ms)


def host_costs(rounds: int, attention_ms: float) -> HostCosts:
    """A shape of 24 layers whose 32 sequences take a new block every 64 tokens each, beside `attention_ms` a layer."""
    layers, n_blocks, batch = 24, 16, 32
    layout = KvLayout(layers=layers, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="float32", block_tokens=64)
    memory = open_page_memory(layers * n_blocks * layout.page_bytes, layout, page_chunks=True)
    memory.pages.rows[:] = 1
    ids = np.random.default_rng(0).permutation(layers * n_blocks).astype(np.int32).reshape(layers, n_blocks)
    spans = [_mapped_and_unmapped(memory, ids) for _ in range(rounds)]
    memory.close()
    map_us, unmap_us, read_us = (
        statistics.median(column) * 1e3 / ids.size for column in list(zip(*spans, strict=True))[:3]
    )
    show_us = statistics.median(span[3] for span in spans) * 1e3
    step_us = batch / layout.block_tokens * layers * (map_us + read_us) + batch * show_us
    return HostCosts(map_us, unmap_us, read_us, show_us, step_us / (layers * attention_ms * 1e3))


def _mapped_and_unmapped(memory: PageMemory, ids: NDArray[np.int32]) -> tuple[float, float, float, float]:
    """Milliseconds of mapping, unmapping and reading for the first time all pages; of a `show` that changes nothing."""
    layers, n_blocks = ids.shape
    views = SequenceViews(memory.pages, n_slots=1, context_blocks=n_blocks, lock=memory.vm_lock)

    def read() -> None:
        for layer in range(layers):
            views.keys_values(0, layer, 0, n_blocks * memory.pages.layout.block_tokens).sum()

    def show() -> None:
        views.begin_step("a")
        views.show("a", ids)
        views.end_step()

    map_ms = timed_ms(show)
    show_ms = min(timed_ms(show) for _ in range(100))
    first_ms, again_ms = timed_ms(read), timed_ms(read)
    unmap_ms = timed_ms(lambda: views.forget_from(0))
    views.close()
    return map_ms, unmap_ms, first_ms - again_ms, show_ms


def print_attention(rows: Sequence[Attention]) -> None:
    print(f"{'batch':>5} {'keys':>5} {'view ms':>8} {'gather/view':>12} {'blocks/view':>12}")
    for row in rows:
        print(f"{row.batch:5} {row.length:5} {row.view_ms:8.3f} {row.over_gather:12.2f} {row.over_blocks:12.2f}")
    for name, ratios in (
        ("gather", [row.over_gather for row in rows]),
        ("blocks", [row.over_blocks for row in rows]),
    ):
        best, worst, average = max(ratios), min(ratios), statistics.mean(ratios)
        print(f"{name} over view: average {average:.2f}, best {best:.2f}, worst {worst:.2f}")


def print_steps(rows: Sequence[StepCosts]) -> None:
    print(
        f"\n{'mapping, share of a step':27} {'batch':>5} {'all':>6} {'exposed':>8} {'worst':>6} {'hidden':>7} {'ready':>7}"
    )
    for row in rows:
        shares = f"{row.mapping_share:6.2%} {row.exposed_share:8.2%} {row.worst_exposed_share:6.0%}"
        print(f"{row.way:27} {row.batch:5} {shares} {row.hidden:7.0%} {row.ready:7.0%}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pages = Pages()
    rows = [attention(pages, batch, length, arguments.rounds) for length in LENGTHS for batch in BATCHES]
    pages.close()
    print_attention(rows)
    steps = [measure(way, batch, arguments.steps) for batch in (32, 128) for way in WAYS]
    print_steps(steps)
    layer_ms = next(row.view_ms for row in rows if (row.batch, row.length) == (32, 1024))
    host = host_costs(arguments.rounds, layer_ms)
    print(
        f"\nthis machine, pages of 64 KiB: map {host.map_us:.1f} us, unmap {host.unmap_us:.1f} us, first read "
        f"{host.first_read_us:.1f} us, show without a change {host.show_us:.1f} us a sequence;\nof 32 sequences, each of "
        f"1,024 tokens: {host.step_share:.2%} of a step's attention"
    )
    if arguments.json:
        found = {
            "attention": [asdict(row) for row in rows],
            "steps": [asdict(row) for row in steps],
            "host": asdict(host),
        }
        arguments.json.write_text(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
