"""Counted memory: what calls cost moves the caller's clock, and pools work over it without memory."""

import pytest

from common.errors import OutOfChunks
from common.kv_layout import KvLayout
from kvstore.memory.backend import VmMisuse
from kvstore.memory.chunks import ChunkPool
from kvstore.memory.fake import MEASURED_GPU, FakeBackend, VmCosts
from kvstore.memory.page_pool import PagePool

UNIT = 4096
COSTS = VmCosts(
    create_us=100, release_us=7, map_us=1, access_call_us=30, access_chunk_us=5, unmap_call_us=20, unmap_chunk_us=2
)


def test_each_call_moves_the_clock_by_what_it_costs() -> None:
    now_ms = 0.0

    def advance(by_ms: float) -> None:
        nonlocal now_ms
        now_ms += by_ms

    backend = FakeBackend(8 * UNIT, costs=COSTS, advance_ms=advance)
    where, chunks = backend.reserve(8 * UNIT), [backend.create(UNIT) for _ in range(4)]
    assert now_ms == pytest.approx(0.4)
    backend.map_run(where, 0, chunks)
    assert now_ms == pytest.approx(0.4 + 0.054)
    backend.unmap_run(where, 0, 4)
    assert now_ms == pytest.approx(0.454 + 0.028)
    for chunk in chunks:
        backend.release(chunk)
    assert backend.spent_us == pytest.approx(482 + 28)


def test_mappings_stop_at_the_ceiling() -> None:
    backend = FakeBackend(8 * UNIT, max_mappings=3)
    where, chunk = backend.reserve(8 * UNIT), backend.create(UNIT)
    backend.map_run(where, 0, [chunk, chunk])
    with pytest.raises(OutOfChunks, match="2 are live, and 3 are borne"):
        backend.map_run(where, 2 * UNIT, [chunk, chunk])
    backend.map_run(where, 2 * UNIT, [chunk])
    assert backend.live_mappings == 3


def test_a_page_pool_over_counted_memory_has_shapes_and_no_rows() -> None:
    layout = KvLayout(layers=3, kv_heads=2, head_dim=64, dtype="bfloat16")
    chunk_bytes = 4 * layout.page_bytes
    pages = PagePool(ChunkPool(FakeBackend(1 << 40), 1 << 38, chunk_bytes), layout)
    assert pages.grow(1000) == 4000
    assert tuple(pages.tensor.shape) == (4000, 2, 16, 2, 64)
    with pytest.raises(VmMisuse, match="on meta: use `tensor`"):
        _ = pages.rows
    pages.close()


def test_measured_costs_make_fifty_gigabytes_a_second_of_recycled_chunks() -> None:
    """42 microseconds for each 2 MiB that is mapped, however many share a call."""
    chunk_bytes = 2 * 2**20
    backend = FakeBackend(1 << 30, costs=MEASURED_GPU)
    where, chunks = backend.reserve(1 << 30), [backend.create(chunk_bytes) for _ in range(512)]
    begin_us = backend.spent_us
    backend.map_run(where, 0, chunks)
    assert 45e9 < 2**30 / (backend.spent_us - begin_us) * 1e6 < 60e9
