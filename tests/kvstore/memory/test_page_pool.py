"""Laws of page memory: what it holds, where it lies, and that it goes back."""

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from common.errors import ConfigError, OutOfChunks
from common.kv_layout import KvLayout
from kvstore.memory.backend import VmMisuse
from kvstore.memory.chunks import ChunkPool
from kvstore.memory.memfd import MemfdBackend
from kvstore.memory.page_memory import PageMemory, open_page_memory
from kvstore.memory.page_pool import PagePool
from kvstore.memory.plan import chunk_bytes_for, memory_plan

LAYOUT = KvLayout(layers=3, kv_heads=2, head_dim=64, dtype="float32")
MIB = 2**20


@pytest.fixture
def memory() -> Iterator[PageMemory]:
    opened = open_page_memory(8 * MIB, LAYOUT)
    yield opened
    opened.close()


def test_a_page_written_through_the_tensor_lies_where_its_chunks_offset_says(memory: PageMemory) -> None:
    pages, fd, chunk_pages = memory.pages, memory.backend.fd, memory.plan.chunk_bytes // LAYOUT.page_bytes
    memory.pages.shrink(3)
    pages.grow(3)  # chunks may now lie in another order than the pages
    for page in (0, 1, pages.n_pages // 2, pages.n_pages - 1):
        pages.tensor[page] = float(page + 1)
        chunk, within = divmod(page, chunk_pages)
        raw = os.pread(fd, LAYOUT.page_bytes, pages.chunk_offsets[chunk] + within * LAYOUT.page_bytes)
        assert torch.frombuffer(bytearray(raw), dtype=torch.float32).eq(page + 1).all()
        assert bytes(pages.rows[page]) == raw


def test_old_views_see_the_same_memory_after_growth() -> None:
    chunks = ChunkPool(MemfdBackend(2 * 16384 * 3), 2 * 16384 * 3, 16384 * 3)
    pages = PagePool(chunks, LAYOUT)
    assert pages.n_pages == 0
    assert pages.grow(1) == 3
    early = pages.tensor
    assert pages.grow(1) == 3
    early[2] = 5.0
    assert pages.tensor[2].eq(5.0).all()
    assert tuple(pages.tensor.shape) == (6, 16, 2, 2, 64)
    pages.close()
    chunks.close()


def test_shrinking_gives_memory_back_and_lets_others_have_it(memory: PageMemory) -> None:
    before_bytes = memory.backend.resident_bytes
    memory.pages.shrink(2)
    assert memory.backend.resident_bytes == before_bytes - 2 * memory.plan.chunk_bytes
    others = memory.chunks.alloc("weights", 2)
    with pytest.raises(OutOfChunks):
        memory.pages.grow(1)
    memory.chunks.free("weights", others)
    memory.pages.grow(2)


def test_closing_gives_every_chunk_back() -> None:
    memory = open_page_memory(8 * MIB, LAYOUT)
    memory.pages.close()
    assert memory.chunks.used_chunks == 0
    assert memory.backend.resident_bytes == 0
    memory.close()


def test_pages_beyond_the_memory_are_in_no_chunk(memory: PageMemory) -> None:
    with pytest.raises(VmMisuse, match="page"):
        memory.pages.chunk_of(memory.pages.n_pages)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 8])
def test_no_page_straddles_two_chunks(head_dim: int, kv_heads: int) -> None:
    layout = replace(LAYOUT, head_dim=head_dim, kv_heads=kv_heads, dtype="bfloat16")
    chunk_bytes = chunk_bytes_for(layout.page_bytes, 4096, 2 * MIB)
    assert chunk_bytes % layout.page_bytes == 0
    assert chunk_bytes % 4096 == 0
    assert MIB <= chunk_bytes <= 4 * MIB


def test_chunks_that_cut_pages_are_refused() -> None:
    with pytest.raises(VmMisuse, match="whole pages"):
        PagePool(ChunkPool(MemfdBackend(8 * MIB), 8 * MIB, 4096), LAYOUT)


def test_the_plan_says_what_the_pool_then_has(memory: PageMemory) -> None:
    plan = memory.plan
    assert plan == memory_plan(8 * MIB, LAYOUT, 4096, 2 * MIB, limit_bytes=plan.limit_chunks * plan.chunk_bytes)
    assert (plan.pages, plan.page_bytes) == (memory.pages.n_pages, LAYOUT.page_bytes)
    assert plan.tokens == plan.pages // 3 * 16
    assert str(plan) == "8.0 MiB: 4 chunks of 2.0 MiB, 512 pages of 16.0 KiB, KV of 2720 tokens"


def test_a_budget_that_holds_no_token_block_is_refused_with_what_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"give at least 2\.0 MiB"):
        memory_plan(MIB, LAYOUT, 4096, 2 * MIB)


def test_a_budget_above_the_memory_of_the_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--device-memory=1024\.0 TiB is more than"):
        open_page_memory(2**50, LAYOUT)
