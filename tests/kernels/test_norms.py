"""Norms mean what the layers of transformers compute, rounding included."""

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kernels import reference_ops
from kernels.checks import KernelInputError
from kernels.norms import add_rms_norm, rms_norm
from tests.kernels.rounding import assert_same_but_for_a_last_digit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_the_reference_is_the_layer_of_transformers() -> None:
    x, weight = torch.randn(3, 48).bfloat16(), torch.randn(48).bfloat16()
    llama, gemma = LlamaRMSNorm(48, eps=1e-5).bfloat16(), Gemma3RMSNorm(48, eps=1e-5).bfloat16()
    with torch.no_grad():
        llama.weight.copy_(weight)
        gemma.weight.copy_(weight)
        assert torch.equal(reference_ops.rms_norm(x, weight, 1e-5), llama(x))
        assert torch.equal(reference_ops.rms_norm(x, weight, 1e-5, offset=1.0), gemma(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_is_the_references(dtype: torch.dtype, offset: float, device: torch.device) -> None:
    x, weight = (torch.randn(5, 96, device=device) * 3).to(dtype), torch.randn(96, device=device).to(dtype)
    expected = reference_ops.rms_norm(x, weight, 1e-5, offset=offset)
    assert_same_but_for_a_last_digit(rms_norm(x, weight, 1e-5, offset=offset), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_after_an_addition_leaves_the_rounded_sum_in_the_residual(
    dtype: torch.dtype, device: torch.device
) -> None:
    x, residual = torch.randn(4, 40, device=device).to(dtype), torch.randn(4, 64, device=device).to(dtype)[:, :40]
    weight = torch.randn(40, device=device).to(dtype)
    total = x + residual
    normed = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(residual, total)
    assert_same_but_for_a_last_digit(normed, reference_ops.rms_norm(total, weight, 1e-6))


def test_no_rows_give_no_rows(device: torch.device) -> None:
    assert rms_norm(torch.empty(0, 8, device=device), torch.ones(8, device=device), 1e-6).shape == (0, 8)


def test_a_weight_of_another_length_is_refused(device: torch.device) -> None:
    with pytest.raises(KernelInputError, match=r"weight: \(7,\), expected \[8\]"):
        rms_norm(torch.ones(1, 8, device=device), torch.ones(7, device=device), 1e-6)
