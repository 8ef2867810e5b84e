"""What this card can do, measured in the run that divides by it: copy bandwidth and matrix products."""

from functools import lru_cache

import torch
from triton.testing import do_bench

from benchmarks.gpu.table import Row, run_and_write

_COPY_BYTES = 4 * 2**30
_SIDE = 8192


@lru_cache
def copy_bytes_per_s() -> float:
    """Bytes read plus bytes written by a device copy much larger than the cache."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    elapsed_ms = do_bench(lambda: target.copy_(source), warmup=20, rep=100, return_mode="median")
    return 2 * _COPY_BYTES / (elapsed_ms / 1e3)


@lru_cache
def read_bytes_per_s() -> float:
    """Bytes read by a sum: what a kernel that writes next to nothing may reach."""
    source = torch.empty(_COPY_BYTES // 2, dtype=torch.bfloat16, device="cuda").normal_()
    elapsed_ms = do_bench(lambda: source.sum(dtype=torch.float32), warmup=20, rep=100, return_mode="median")
    return source.nbytes / (elapsed_ms / 1e3)


@lru_cache
def matmul_flop_per_s() -> float:
    """Of a large bfloat16 product on random data."""
    a = torch.randn(_SIDE, _SIDE, dtype=torch.bfloat16, device="cuda")
    b = torch.randn(_SIDE, _SIDE, dtype=torch.bfloat16, device="cuda")
    elapsed_ms = do_bench(lambda: a @ b, warmup=50, rep=200, return_mode="median")
    return 2 * _SIDE**3 / (elapsed_ms / 1e3)


def run(quick: bool) -> list[Row]:
    """All limits."""
    del quick
    return [
        Row("device copy, read + written", copy_bytes_per_s() / 1e12, "TB/s", None, torch.cuda.get_device_name()),
        Row("device read (sum)", read_bytes_per_s() / 1e12, "TB/s", None, ""),
        Row("bf16 product of 8192^3", matmul_flop_per_s() / 1e12, "TFLOP/s", None, ""),
    ]


if __name__ == "__main__":
    run_and_write(run, __doc__)
