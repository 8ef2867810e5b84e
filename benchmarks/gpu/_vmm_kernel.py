"""The kernel of the mixed range experiment. Apart, because importing it needs triton."""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def copy_kernel(source: Any, target: Any, BLOCK: tl.constexpr) -> None:
    """Copy 32-bit values; the length is a multiple of BLOCK."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at))
