"""Refusing arguments a kernel cannot take, before it reads memory it should not."""

from torch import Tensor


class KernelInputError(ValueError):
    """An argument has a shape, dtype or device the kernel does not take. The text names the argument."""


def require(condition: bool, argument: str, found: object, expected: str) -> None:
    """Raise KernelInputError unless `condition` holds."""
    if not condition:
        raise KernelInputError(f"{argument}: {found}, expected {expected}")


def require_same_device(first: Tensor, **others: Tensor) -> None:
    """Raise KernelInputError, naming the argument, unless all tensors lie on the device of `first`."""
    for name, other in others.items():
        if other.device != first.device:  # kernels check on every launch: no text is made in vain
            raise KernelInputError(f"{name}: on {other.device}, expected the device {first.device}")
