"""How large KV is."""

from hypothesis import given
from hypothesis import strategies as st

from common.kv_layout import KvLayout

LAYOUT = KvLayout(layers=3, kv_heads=2, head_dim=8, dtype="bfloat16")


def test_a_page_is_k_and_v_of_one_layer_of_one_block() -> None:
    assert LAYOUT.page_bytes == 2 * 16 * 2 * 8 * 2


@given(st.integers(0, 10_000))
def test_blocks_cover_the_tokens_and_no_block_is_empty(tokens: int) -> None:
    blocks = LAYOUT.blocks_for(tokens)
    assert (blocks - 1) * LAYOUT.block_tokens < tokens <= blocks * LAYOUT.block_tokens or tokens == blocks == 0
    assert LAYOUT.pages_for(tokens) == blocks * LAYOUT.layers
