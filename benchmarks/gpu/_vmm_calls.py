"""Latencies of the driver's calls: alone, while kernels run, and next to a loop of short steps."""

import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from benchmarks.gpu.table import Row
from kvstore.memory.cuda_driver import CudaDriver

T = TypeVar("T")
_MIB = 2**20
_CHUNKS_MIB = (2, 64)
_RUNS = (1, 8, 64, 512)
_LOAD_SIDE = 8192
_STEP_SIDE = 2048
_STEP_MS = 10.0


def call_costs(quick: bool) -> list[Row]:
    """create, map, access, unmap, release for runs of chunks; the ratio is the 99th percentile over the median."""
    driver, rows = CudaDriver(0), list[Row]()
    for chunk_mib in _CHUNKS_MIB:
        chunk_bytes, times = chunk_mib * _MIB, _Times(f"{chunk_mib} MiB")
        handles = [times.take("create", partial(driver.create, chunk_bytes)) for _ in range(_RUNS[-1])]
        address = times.take("reserve 64 GiB", lambda: driver.reserve(64 * 2**30))
        for n in _RUNS:
            for _ in range(max(2, (64 if quick else 256) // n)):
                _one_run(driver, address, chunk_bytes, handles[:n], times)
        for handle in handles:
            times.take("release", partial(driver.release, handle))
        times.take("free 64 GiB of addresses", partial(driver.unreserve, address, 64 * 2**30))
        rows += times.rows()
    return rows


def _one_run(driver: CudaDriver, address: int, chunk_bytes: int, handles: list[int], times: "_Times") -> None:
    """Map a run and undo it, once with one access and one unmap call for all, once with one for each chunk."""
    n = len(handles)
    places = [address + i * chunk_bytes for i in range(n)]
    for place, handle in zip(places, handles, strict=True):
        times.take(f"map, run of {n}", partial(driver.map, place, chunk_bytes, handle))
    times.take(f"access once for {n}", lambda: driver.allow(address, n * chunk_bytes))
    times.take(f"unmap once for {n}", lambda: driver.unmap(address, n * chunk_bytes))
    if n == 1:
        return
    for place, handle in zip(places, handles, strict=True):
        driver.map(place, chunk_bytes, handle)
        times.take(f"access each of {n}", partial(driver.allow, place, chunk_bytes))
    for place in places:
        times.take(f"unmap each of {n}", partial(driver.unmap, place, chunk_bytes))


def under_load(quick: bool) -> list[Row]:
    """Whether map and unmap wait for running kernels, and what a mapping thread does to a loop of 10 ms steps."""
    import torch

    torch.cuda.init()
    driver = CudaDriver(0)
    left, right = (torch.randn(_LOAD_SIDE, _LOAD_SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)

    def load() -> None:
        torch.mm(left, right, out=out)

    rows = _while_kernels_run(driver, load, rounds=5 if quick else 15)
    return rows + _beside_steps(driver, 50 if quick else 150)


def _while_kernels_run(driver: CudaDriver, load: Callable[[], None], rounds: int) -> list[Row]:
    import torch

    chunk_bytes, n, kernels = 2 * _MIB, 64, 60
    handles = [driver.create(chunk_bytes) for _ in range(n)]
    address = driver.reserve(n * chunk_bytes)
    times, waited, alone_ms, beside_ms = _Times("2 MiB, kernels running"), 0, list[float](), list[float]()
    for mapping in [False, True] * rounds:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        load()
        torch.cuda.synchronize()
        start.record()
        for _ in range(kernels):
            load()
        end.record()
        if mapping:
            _one_run(driver, address, chunk_bytes, handles[:1], times)
            _one_run(driver, address, chunk_bytes, handles, times)
            times.take("create", lambda: handles.append(driver.create(chunk_bytes)))
            times.take("release", lambda: driver.release(handles.pop()))
            waited += end.query()
        torch.cuda.synchronize()
        (beside_ms if mapping else alone_ms).append(start.elapsed_time(end))
    for handle in handles:
        driver.release(handle)
    alone, beside = statistics.median(alone_ms), statistics.median(beside_ms)
    return [
        *times.rows(),
        Row("rounds in which the calls outlasted the kernels", waited, "rounds", waited / rounds, "all rounds"),
        Row(f"{kernels} GEMMs while mapping", beside, "ms", beside / alone, f"{alone:.1f} ms without mapping"),
    ]


def _beside_steps(driver: CudaDriver, steps: int) -> list[Row]:
    import torch

    left, right = (torch.randn(_STEP_SIDE, _STEP_SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)

    def step(n: int) -> float:
        begin = time.perf_counter()
        for _ in range(n):
            torch.mm(left, right, out=out)
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) * 1000

    step(100)
    n = max(1, int(100 * _STEP_MS / statistics.median(step(100) for _ in range(5))))
    alone = [step(n) for _ in range(steps)]
    stop, times = threading.Event(), _Times("2 MiB, thread beside 10 ms steps")
    mapper = threading.Thread(target=_map_often, args=(driver, stop, times))
    mapper.start()
    beside = [step(n) for _ in range(steps)]
    stop.set()
    mapper.join()
    rows = [
        Row(f"step, {what} percentile, beside a mapping thread", _at(beside, share), "ms",
            _at(beside, share) / _at(alone, share), f"{_at(alone, share):.2f} ms alone")
        for what, share in (("50th", 0.5), ("99th", 0.99))
    ]  # fmt: skip
    return times.rows() + rows


def _map_often(driver: CudaDriver, stop: threading.Event, times: "_Times") -> None:
    chunk_bytes, n = 2 * _MIB, 64
    handles = [driver.create(chunk_bytes) for _ in range(n)]
    address = driver.reserve(n * chunk_bytes)
    while not stop.wait(0.002):
        for i, handle in enumerate(handles):
            times.take(f"map, run of {n}", partial(driver.map, address + i * chunk_bytes, chunk_bytes, handle))
        times.take(f"access once for {n}", lambda: driver.allow(address, n * chunk_bytes))
        times.take(f"unmap once for {n}", lambda: driver.unmap(address, n * chunk_bytes))
    for handle in handles:
        driver.release(handle)


class _Times:
    """Durations by name, in the order the names came up."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._taken_us: dict[str, list[float]] = {}

    def take(self, name: str, call: Callable[[], T]) -> T:
        """Call and note how long it took."""
        begin_ns = time.perf_counter_ns()
        result = call()
        self._taken_us.setdefault(name, []).append((time.perf_counter_ns() - begin_ns) / 1000)
        return result

    def rows(self) -> list[Row]:
        """Medians; the ratio is the 99th percentile over the median."""
        found = []
        for name, taken_us in self._taken_us.items():
            median_us, high_us = _at(taken_us, 0.5), _at(taken_us, 0.99)
            against = f"99th percentile {high_us:.1f} us of {len(taken_us)}"
            found.append(Row(f"{self._what}: {name}", median_us, "us", high_us / max(median_us, 1e-9), against))
        return found


def _at(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
