"""Merging on a device means what kernels.reference says."""

import pytest
import torch

from kernels import reference
from kernels.checks import KernelInputError
from kernels.merge import merge_partials
from kernels.merge_kernel import merge_on_device


@pytest.mark.parametrize("head_dim", [8, 80])
def test_merging_on_a_device_equals_the_reference(head_dim: int, device: torch.device) -> None:
    chance = torch.Generator().manual_seed(1)
    out_a = torch.randn(7, 3, head_dim, generator=chance)
    out_b = torch.randn(3, 7, head_dim, generator=chance).transpose(0, 1)
    lse_a, lse_b = torch.randn(7, 3, generator=chance) * 50, (torch.randn(3, 7, generator=chance) * 50).T
    lse_a[0], lse_b[0] = float("-inf"), float("-inf")
    lse_a[1], lse_b[2] = float("-inf"), float("-inf")
    parts = [one.to(device) for one in (out_a, lse_a, out_b, lse_b)]
    torch.testing.assert_close(merge_on_device(*parts), reference.merge_partials(*parts), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
def test_merge_partials_of_tensors_on_a_device_checks_and_merges() -> None:
    parts = [torch.randn(5, 2, 16, device="cuda").bfloat16(), torch.randn(5, 2, device="cuda")] * 2
    torch.testing.assert_close(merge_partials(*parts), reference.merge_partials(*parts), atol=1e-2, rtol=1e-2)
    with pytest.raises(KernelInputError, match="lse_b"):
        merge_partials(*parts[:3], parts[3].bfloat16())
