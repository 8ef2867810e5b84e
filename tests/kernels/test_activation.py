"""The gate means what the MLP layers of transformers compute, rounding included."""

import pytest
import torch
from transformers.activations import ACT2FN

from kernels import reference_ops
from kernels.activation import GateKind, gated
from kernels.checks import KernelInputError
from tests.kernels.rounding import assert_same_but_for_a_last_digit

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter: inf is meant

KINDS: dict[GateKind, str] = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gate_is_the_activation_of_transformers(kind: GateKind, dtype: torch.dtype, device: torch.device) -> None:
    gate_up = (torch.randn(3, 140, device=device) * 4).to(dtype)
    expected = reference_ops.gated(gate_up, kind=kind)
    assert torch.equal(expected, ACT2FN[KINDS[kind]](gate_up[:, :70]) * gate_up[:, 70:])
    assert_same_but_for_a_last_digit(gated(gate_up, kind=kind), expected)


def test_large_values_do_not_overflow(device: torch.device) -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 1.0, 1.0]], device=device)
    for kind in KINDS:
        assert torch.equal(gated(gate_up, kind=kind), torch.tensor([[-0.0, 200.0]], device=device))


def test_an_odd_width_is_refused(device: torch.device) -> None:
    with pytest.raises(KernelInputError, match=r"gate_up: \(1, 3\)"):
        gated(torch.ones(1, 3, device=device))
