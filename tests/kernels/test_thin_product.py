"""The product of one row equals the operators it stands for, one after the other."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels import reference_ops
from kernels.checks import KernelInputError
from kernels.thin_product import Norm, thin_product
from tests.kernels.rounding import assert_same_but_for_a_last_digit


def drawn(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
def test_it_equals_the_operators_one_after_the_other(
    offset: float | None, dtype: torch.dtype, device: torch.device
) -> None:
    m, n = 37, 72
    x, gain = drawn(1, n, dtype=dtype, device=device), drawn(n, dtype=dtype, device=device)
    weight, bias = drawn(m, n, dtype=dtype, device=device) / n**0.5, drawn(m, dtype=dtype, device=device)
    norm = None if offset is None else Norm(gain, 1e-5, offset)
    entering = x if offset is None else reference_ops.rms_norm(x, gain, 1e-5, offset=offset)
    product = (entering.double() @ weight.double().T + bias.double()).to(dtype)
    assert_same_but_for_a_last_digit(thin_product(x, weight, bias, norm=norm), product)


def test_the_residual_is_added_in_place(device: torch.device) -> None:
    x, weight = drawn(1, 48, dtype=torch.float32, device=device), drawn(20, 48, dtype=torch.float32, device=device)
    residual = drawn(1, 20, dtype=torch.float32, device=device)
    expected = residual + linear(x, weight)
    found = thin_product(x, weight, residual=residual)
    assert found.data_ptr() == residual.data_ptr()
    torch.testing.assert_close(residual, expected, rtol=1e-5, atol=1e-5)


def test_more_than_one_row_is_refused(device: torch.device) -> None:
    with pytest.raises(KernelInputError, match="x"):
        thin_product(torch.zeros(2, 16, device=device), torch.zeros(16, 16, device=device))
