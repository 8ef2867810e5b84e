"""Products of a few rows equal the operators they stand for, one after the other."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels import reference_ops
from kernels.checks import KernelInputError
from kernels.thin_product import MOST_ROWS, Norm, thin_product
from tests.kernels.rounding import assert_same_but_for_a_last_digit


def drawn(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("before", ["nothing", "norm", "offset", "silu", "gelu_tanh"])
def test_it_equals_the_operators_one_after_the_other(
    before: str, rows: int, dtype: torch.dtype, device: torch.device
) -> None:
    m, n = 37, 72
    gate = before in ("silu", "gelu_tanh")
    x = drawn(rows, 2 * n if gate else n, dtype=dtype, device=device)
    weight, bias = drawn(m, n, dtype=dtype, device=device) / n**0.5, drawn(m, dtype=dtype, device=device)
    gain, offset = drawn(n, dtype=dtype, device=device), 1.0 if before == "offset" else 0.0
    entering: Tensor = x
    how: Norm | str | None = None
    if gate:
        entering, how = reference_ops.gated(x, kind=before), before
    elif before != "nothing":
        entering, how = reference_ops.rms_norm(x, gain, 1e-5, offset=offset), Norm(gain, 1e-5, offset)
    product = (entering.double() @ weight.double().T + bias.double()).to(dtype)
    assert_same_but_for_a_last_digit(thin_product(x, weight, bias, before=how), product)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [1, 2])
def test_the_residual_is_added_in_place(rows: int, device: torch.device) -> None:
    x, weight = drawn(rows, 48, dtype=torch.float32, device=device), drawn(20, 48, dtype=torch.float32, device=device)
    residual = drawn(rows, 20, dtype=torch.float32, device=device)
    expected = residual + linear(x, weight)
    found = thin_product(x, weight, residual=residual)
    assert found.data_ptr() == residual.data_ptr()
    torch.testing.assert_close(residual, expected, rtol=1e-5, atol=1e-5)


def test_too_many_rows_are_refused(device: torch.device) -> None:
    x = torch.zeros(MOST_ROWS + 1, 16, device=device)
    with pytest.raises(KernelInputError, match="rows"):
        thin_product(x, torch.zeros(16, 16, device=device))
