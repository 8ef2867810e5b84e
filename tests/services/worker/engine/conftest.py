"""Triton's interpreter for engines whose kernels are Triton's, as for the kernels themselves."""

from tests.kernels.conftest import device, pytest_runtest_setup

__all__ = ["device", "pytest_runtest_setup"]
