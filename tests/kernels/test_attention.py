"""Attention kernels mean what kernels.reference says."""

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.attention import decode_attention, prefill_attention
from kernels.checks import KernelInputError
from kernels.merge import merge_partials

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found: tuple[Tensor, Tensor], meant: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    torch.testing.assert_close(found[0].float(), meant[0].float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(found[1], meant[1], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_prefill_over_a_cached_prefix_equals_the_reference(head_dim: int, dtype: torch.dtype) -> None:
    query = drawn(7, 4, head_dim, dtype=dtype)
    key, value = drawn(40, 2, head_dim, dtype=dtype, seed=1), drawn(40, 2, head_dim, dtype=dtype, seed=2)
    found = prefill_attention(query, key, value, scaling=head_dim**-0.5)
    assert_close(found, reference.attention(query, key, value, offset=33, scaling=head_dim**-0.5), dtype)


@pytest.mark.long
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("window_tokens", [1, 3, 39, 40, 100])
def test_prefill_sees_only_the_window(tokens: int, window_tokens: int) -> None:
    query, key, value = drawn(tokens, 6, 16), drawn(40, 3, 16, seed=1), drawn(40, 3, 16, seed=2)
    found = prefill_attention(query, key, value, scaling=0.25, window_tokens=window_tokens)
    meant = reference.attention(query, key, value, offset=40 - tokens, scaling=0.25, window_tokens=window_tokens)
    assert_close(found, meant, torch.float32)


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_decode_of_ragged_sequences_equals_the_reference_of_each(kv_heads: int) -> None:
    lengths = [1, 16, 17, 50]
    query = drawn(4, 8, 32)
    key, value = drawn(4, 64, kv_heads, 32, seed=1), drawn(4, 64, kv_heads, 32, seed=2)
    mask = torch.zeros(4, 64)
    for row, length in enumerate(lengths):
        mask[row, length:] = float("-inf")
    out, lse = decode_attention(query, key, value, mask, scaling=0.2)
    for row, length in enumerate(lengths):
        meant = reference.attention(
            query[row : row + 1], key[row, :length], value[row, :length], offset=length - 1, scaling=0.2
        )
        assert_close((out[row : row + 1], lse[row : row + 1]), meant, torch.float32)


def test_decode_of_a_sequence_without_keys_is_zero_with_lse_minus_infinity() -> None:
    out, lse = decode_attention(
        drawn(1, 2, 16), drawn(1, 8, 1, 16), drawn(1, 8, 1, 16), torch.full((1, 8), float("-inf")), scaling=1.0
    )
    assert torch.equal(out, torch.zeros(1, 2, 16))
    assert torch.equal(lse, torch.full((1, 2), float("-inf")))


def test_attention_over_two_parts_merges_to_attention_over_all() -> None:
    query, key, value = drawn(3, 4, 16), drawn(20, 2, 16, seed=1), drawn(20, 2, 16, seed=2)
    whole = reference.attention(query, key, value, offset=17, scaling=0.3)
    first = reference.attention(query, key[:9], value[:9], offset=17, scaling=0.3)
    second = reference.attention(query, key[9:], value[9:], offset=8, scaling=0.3)
    assert_close(merge_partials(*first, *second), whole, torch.float32)
    assert_close(merge_partials(*second, *first), whole, torch.float32)


@pytest.mark.parametrize("empty", ["a", "b", "both"])
def test_merging_an_empty_part_changes_nothing_and_gives_no_nan(empty: str) -> None:
    out_a, lse_a = drawn(3, 2, 8), drawn(3, 2, seed=1)
    out_b, lse_b = drawn(3, 2, 8, seed=2), drawn(3, 2, seed=3)
    nothing = torch.full((3, 2), float("-inf"))
    lse_a = nothing if empty in ("a", "both") else lse_a
    lse_b = nothing if empty in ("b", "both") else lse_b
    out, lse = merge_partials(out_a, lse_a, out_b, lse_b)
    meant = {"a": (out_b, lse_b), "b": (out_a, lse_a), "both": (torch.zeros(3, 2, 8), nothing)}[empty]
    assert_close((out, lse), meant, torch.float32)
    torch.testing.assert_close((out, lse), reference.merge_partials(out_a, lse_a, out_b, lse_b))


def test_merging_huge_scores_does_not_overflow() -> None:
    out, lse = merge_partials(drawn(1, 1, 4), torch.tensor([[300.0]]), drawn(1, 1, 4, seed=1), torch.tensor([[299.0]]))
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()


def test_merge_is_the_same_in_both_orders() -> None:
    a, b = (drawn(5, 2, 8), drawn(5, 2, seed=1)), (drawn(5, 2, 8, seed=2), drawn(5, 2, seed=3))
    for found, swapped in zip(merge_partials(*a, *b), merge_partials(*b, *a), strict=True):
        assert torch.equal(found, swapped)


def test_wrong_shapes_are_refused_by_the_name_of_the_argument() -> None:
    with pytest.raises(KernelInputError, match="value: "):
        prefill_attention(drawn(2, 2, 8), drawn(4, 1, 8), drawn(5, 1, 8), scaling=1.0)
    with pytest.raises(KernelInputError, match="query: 3 heads"):
        prefill_attention(drawn(2, 3, 8), drawn(4, 2, 8), drawn(4, 2, 8), scaling=1.0)
    with pytest.raises(KernelInputError, match="lse_b"):
        merge_partials(drawn(2, 2, 8), drawn(2, 2), drawn(2, 2, 8), drawn(2, 3))
