"""The page pool as a worker has it: how long it takes to open, to grow and to shrink, and that its memory is as fast.

python -m benchmarks.gpu.pool [--quick] [--json FILE]
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from triton.testing import do_bench

from benchmarks.gpu._pool_load import rows_under_load
from benchmarks.gpu.table import Row, run_and_write
from common.kv_layout import KvLayout
from common.units import GIB
from kvstore.memory.page_memory import PageMemory, open_page_memory

T = TypeVar("T")
_LAYOUT = KvLayout(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16")
_BUDGET_BYTES, _QUICK_BUDGET_BYTES = 48 * GIB, 8 * GIB
_COPIED_BYTES = 2 * GIB
_STEPS = 7


def run(quick: bool) -> list[Row]:
    """Open, resize, read, close."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.zeros(1, device=device)  # the context is not the pool's affair
    budget_bytes = _QUICK_BUDGET_BYTES if quick else _BUDGET_BYTES
    before_bytes = torch.cuda.mem_get_info(device)[0]
    open_s, memory = _timed(lambda: open_page_memory(budget_bytes, _LAYOUT, device))
    taken_bytes = before_bytes - torch.cuda.mem_get_info(device)[0]
    pool_bytes = memory.plan.chunks * memory.plan.chunk_bytes
    rows = [
        Row(f"open a pool of {budget_bytes // GIB} GiB", 1e3 * open_s, "ms", None, f"{memory.plan.chunks} chunks"),
        Row("memory it takes", taken_bytes / GIB, "GiB", taken_bytes / pool_bytes, "what its pages hold"),
        *_resizing(memory),
        *_speed(memory, device),
    ]
    close_s, _ = _timed(memory.close)
    left_bytes = before_bytes - torch.cuda.mem_get_info(device)[0]
    torch.cuda.empty_cache()
    rows += rows_under_load()
    return [
        *rows,
        Row("close it", 1e3 * close_s, "ms", None, ""),
        Row("memory kept after closing", left_bytes / GIB, "GiB", None, "torch's cache of the copies among it"),
    ]


def _resizing(memory: PageMemory) -> list[Row]:
    chunks, rows = memory.plan.chunks, list[Row]()
    for gib in (0.0625, 1.0):
        change = max(1, int(gib * GIB) // memory.plan.chunk_bytes)
        taken_s: dict[str, list[float]] = {"shrink": [], "grow": []}
        for _ in range(_STEPS):
            taken_s["shrink"].append(_timed(partial(memory.resize, chunks - change))[0])
            taken_s["grow"].append(_timed(lambda: memory.resize(chunks))[0])
        for name, found_s in taken_s.items():
            median_s = statistics.median(found_s)
            rate = change * memory.plan.chunk_bytes / median_s / GIB
            rows.append(Row(f"{name} by {gib:g} GiB", 1e3 * median_s, "ms", None, f"{rate:.0f} GiB/s"))
    return rows


def _speed(memory: PageMemory, device: torch.device) -> list[Row]:
    """Copies and scattered reads of the pool's pages beside those of a tensor that torch allocated."""
    n_pages = _COPIED_BYTES // _LAYOUT.page_bytes
    pool = memory.pages.tensor[:n_pages].view(n_pages, -1).normal_()
    plain = torch.empty_like(pool).normal_()
    out, ids = torch.empty_like(pool), torch.randperm(n_pages, device=device)
    rows = []
    for name, call in (
        ("copy", lambda source: out.copy_(source)),
        ("gather of scattered pages", lambda source: torch.index_select(source, 0, ids, out=out)),
    ):
        pool_s, plain_s = (_device_s(call, source) for source in (pool, plain))
        against = f"the same over torch's own memory, {2 * _COPIED_BYTES / plain_s / 1e12:.2f} TB/s"
        rows.append(
            Row(f"{name}, read + written", 2 * _COPIED_BYTES / pool_s / 1e12, "TB/s", plain_s / pool_s, against)
        )
    return rows


def _device_s(call: Callable[[Tensor], object], source: Tensor) -> float:
    return float(do_bench(lambda: call(source), warmup=10, rep=60, return_mode="median")) / 1e3


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    began_s = time.perf_counter()
    result = call()
    return time.perf_counter() - began_s, result


if __name__ == "__main__":
    run_and_write(run, __doc__)
