"""Laws of dividing memory."""

import pytest

from common.errors import ConfigError
from common.kv_layout import KvLayout
from common.units import GIB, KIB, MIB, MemoryShare
from kvstore.memory.plan import chunk_bytes_for, device_chunk_bytes, kv_budget, memory_plan, virtual_block_tokens


def test_a_share_is_of_all_memory_and_the_model_comes_out_of_it() -> None:
    assert kv_budget(80 * GIB, MemoryShare(90), 15 * GIB, 2 * GIB) == 72 * GIB - 17 * GIB


@pytest.mark.parametrize(
    ("weights_bytes", "way_out"), [(71 * GIB, "give more than 91%"), (90 * GIB, "a smaller model or a larger device")]
)
def test_a_share_that_leaves_nothing_is_refused_with_a_way_out(weights_bytes: int, way_out: str) -> None:
    with pytest.raises(ConfigError, match=rf"--device-memory=80% is 64\.0 GiB of 80\.0 GiB; .*{way_out}"):
        kv_budget(80 * GIB, MemoryShare(80), weights_bytes, 2 * GIB)


@pytest.mark.parametrize("budget_bytes", [64 * MIB, 600 * MIB, 2 * GIB, 100 * GIB])
def test_a_device_has_sixteen_chunks_at_least_and_none_far_above_64_mib(budget_bytes: int) -> None:
    chunk_bytes = chunk_bytes_for(64 * 2**10, 2 * MIB, device_chunk_bytes(budget_bytes))
    assert chunk_bytes % (2 * MIB) == 0
    assert 2 * MIB <= chunk_bytes <= 64 * MIB
    assert round(budget_bytes / chunk_bytes) >= 16


@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "dtype", "granularity_bytes", "least_page_bytes", "tokens"),
    [
        (8, 128, "bfloat16", 2 * MIB, 0, 512),  # Llama 3 8B
        (2, 64, "bfloat16", 2 * MIB, 0, 4096),  # Qwen 2.5 0.5B
        (2, 64, "float32", 4 * KIB, 64 * KIB, 64),
        (3, 80, "float32", 4 * KIB, 64 * KIB, 64),  # 1,920 bytes a token
        (1, 16, "bfloat16", 4 * KIB, 0, 64),
        (8, 256, "float32", 4 * KIB, 64 * KIB, 16),
    ],
)
def test_a_virtual_block_is_the_shortest_whose_pages_are_whole_mappable_units(
    kv_heads: int, head_dim: int, dtype: str, granularity_bytes: int, least_page_bytes: int, tokens: int
) -> None:
    def fits(block_tokens: int) -> bool:
        layout = KvLayout(layers=1, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, block_tokens=block_tokens)
        return layout.page_bytes % granularity_bytes == 0 and layout.page_bytes >= least_page_bytes

    assert virtual_block_tokens(kv_heads, head_dim, dtype, granularity_bytes, least_page_bytes) == tokens
    assert [fits(shorter) for shorter in range(16, tokens + 1, 16)] == [False] * (tokens // 16 - 1) + [True]


def test_pages_that_are_chunks_divide_the_budget_one_by_one() -> None:
    layout = KvLayout(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16", block_tokens=512)
    plan = memory_plan(GIB, layout, 2 * MIB, None, limit_bytes=2 * GIB)
    assert (plan.chunk_bytes, plan.chunks, plan.pages, plan.limit_chunks) == (2 * MIB, 512, 512, 1024)
    assert plan.tokens == 512 // 32 * 512


def test_pages_that_cannot_be_mapped_one_by_one_are_refused_with_blocks_that_can() -> None:
    layout = KvLayout(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"pages of 16 tokens are 64\.0 KiB, .* 2\.0 MiB: .* multiple of 512 tokens"):
        memory_plan(GIB, layout, 2 * MIB, None)
