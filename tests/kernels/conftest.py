"""Kernels written in Triton run in its interpreter where there is no CUDA device; the flag is read at Triton's import."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

_HERE = Path(__file__).parent

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def _mend_interpreter() -> None:
    """Triton 3.6 makes loop bounds of arrays of one element, which numpy refuses from 2.4 on, and it cuts float32 off
    where a device rounds it to bfloat16.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend
    convert = interpreter._convert_float

    def convert_and_round(data: Any, from_type: Any, to_type: Any, rounding: Any) -> Any:
        if from_type.is_fp32() and to_type.is_bf16():
            return torch.from_numpy(np.array(data)).bfloat16().view(torch.uint16).numpy()
        return convert(data, from_type, to_type, rounding)

    interpreter._convert_float = convert_and_round


def _quicken_interpreter() -> None:
    """Triton 3.6 puts its language in place anew for every call within a kernel; once a launch is enough."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    in_place: set[frozenset[str]] = set()

    def patch_once(function: Any) -> Any:
        languages = frozenset(one.__name__ for one in function.__globals__.values() if one is tl or one is tl.core)
        if languages in in_place:
            return None  # a call within a kernel: nobody takes this back
        scope = patch(function)
        in_place.add(languages)
        restore = scope.restore

        def restore_and_forget() -> None:
            restore()
            in_place.clear()

        scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = patch_once


if not torch.cuda.is_available():
    _mend_interpreter()
    _quicken_interpreter()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():  # what the interpreter runs elsewhere is a test of the device here
        for item in items:
            if item.path.parent == _HERE and "device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def device() -> torch.device:
    """The CUDA device where there is one, or else the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _the_same_numbers_in_every_run() -> None:
    torch.manual_seed(0)
