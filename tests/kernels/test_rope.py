"""Rotation is that of transformers; K and V land in the slots named, and nowhere else."""

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kernels import reference_ops, rope
from kernels.checks import KernelInputError
from kernels.rope import rope_write
from tests.kernels.rounding import assert_same_but_for_a_last_digit

HEADS, KV_HEADS, BLOCK = 3, 2, 4


def angles(tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    phase = torch.rand(tokens, head_dim // 2, device=device).mul(100).repeat(1, 2)
    return phase.cos().to(dtype), phase.sin().to(dtype)


def blank(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((6, BLOCK, 2, KV_HEADS, head_dim), 7.0, dtype=dtype, device=device)


def split(qkv: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = qkv.view(len(qkv), -1, head_dim).split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    return query, key, value


def test_the_reference_is_the_rotation_of_transformers() -> None:
    device = torch.device("cpu")
    x = torch.randn(5, HEADS, 8).bfloat16()
    cos, sin = angles(5, 8, torch.bfloat16, device)
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=1)
    assert torch.equal(reference_ops.rotate(x, cos, sin), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 80])
def test_rotation_and_pages_are_exact(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    slots = torch.tensor([5, -1, 0, 11, 14], device=device)
    qkv = torch.randn(5, (HEADS + 2 * KV_HEADS) * head_dim, device=device).to(dtype)
    cos, sin = angles(5, head_dim, dtype, device)
    pages, expected_pages = blank(head_dim, dtype, device), blank(head_dim, dtype, device)
    query, key, value = split(qkv, head_dim)
    reference_ops.write_pages(expected_pages, slots, reference_ops.rotate(key, cos, sin), value, page_shift=2)
    found = rope_write(qkv, cos, sin, pages, slots, heads=HEADS, page_shift=2)
    tolerance = 1e-6 if dtype == torch.float32 else 0.0  # a compiler may fuse product and sum where nothing is rounded
    torch.testing.assert_close(found, reference_ops.rotate(query, cos, sin), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(pages, expected_pages, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_heads_are_normalised_before_they_turn(offset: float, device: torch.device) -> None:
    head_dim = 16
    qkv = (torch.randn(3, (HEADS + 2 * KV_HEADS) * head_dim, device=device) * 5).bfloat16()
    cos, sin = angles(3, head_dim, torch.bfloat16, device)
    norms = torch.rand(2, head_dim, device=device).add(0.5).bfloat16()
    slots = torch.arange(3, device=device)
    pages, expected_pages = blank(head_dim, torch.bfloat16, device), blank(head_dim, torch.bfloat16, device)
    query, key, value = split(qkv, head_dim)
    query = reference_ops.rms_norm(query, norms[0], 1e-5, offset=offset)
    key = reference_ops.rms_norm(key, norms[1], 1e-5, offset=offset)
    reference_ops.write_pages(expected_pages, slots, reference_ops.rotate(key, cos, sin), value)
    found = rope_write(
        qkv, cos, sin, pages, slots, heads=HEADS, query_norm=norms[0], key_norm=norms[1], epsilon=1e-5, offset=offset
    )
    assert_same_but_for_a_last_digit(found, reference_ops.rotate(query, cos, sin))
    assert_same_but_for_a_last_digit(pages, expected_pages)


def test_pages_of_another_dtype_take_rounded_values(device: torch.device) -> None:
    qkv = torch.randn(2, (HEADS + 2 * KV_HEADS) * 16, device=device)
    cos, sin = angles(2, 16, torch.float32, device)
    pages = blank(16, torch.bfloat16, device)
    rope_write(qkv, cos, sin, pages, torch.tensor([9, 2], device=device), heads=HEADS)
    assert torch.equal(pages[2, 1, 1], split(qkv, 16)[2][0].bfloat16())


def test_rows_of_a_wider_tensor_and_many_tokens_are_the_same(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rope, "_FEW_TOKENS", 2)
    qkv = torch.randn(3, (HEADS + 2 * KV_HEADS) * 16 + 8, device=device)[:, :-8]
    cos, sin = angles(3, 16, torch.float32, device)
    slots = torch.full((3,), -1, device=device)
    pages = blank(16, torch.float32, device)
    found = rope.rope_write(qkv, cos, sin, pages, slots, heads=HEADS)
    query = split(qkv.contiguous(), 16)[0]
    torch.testing.assert_close(found, reference_ops.rotate(query, cos, sin), rtol=1e-6, atol=1e-6)
    assert (pages == 7.0).all()


def test_a_row_of_the_wrong_width_is_refused(device: torch.device) -> None:
    cos, sin = angles(1, 16, torch.float32, device)
    with pytest.raises(KernelInputError, match="qkv: rows of 16, expected 112 for 3 heads"):
        rope_write(
            torch.ones(1, 16, device=device),
            cos,
            sin,
            blank(16, torch.float32, device),
            torch.zeros(1, dtype=torch.int64, device=device),
            heads=HEADS,
        )
