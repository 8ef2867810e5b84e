"""Decode steps of an 8B shape while another thread shrinks and grows the pool's tail: what the steps feel of it."""

import statistics
import threading
import time

import torch

from benchmarks.gpu._shapes import LLAMA_8B, random_llama
from benchmarks.gpu.engine import Sequences
from benchmarks.gpu.table import Row
from common.units import GIB
from kvstore.memory.page_memory import PageMemory, open_page_memory
from kvstore.transport.layer_events import NoLayerEvents
from services.worker.engine.fused.engine import FusedEngine
from services.worker.engine.make import EngineLimits

_BATCH, _LENGTH, _STEPS = 32, 2048, 120
_POOL_BYTES, _CHANGE_BYTES = 24 * GIB, 2 * GIB
_CONTEXT_TOKENS = 4096


def rows_under_load() -> list[Row]:
    """Step times alone and beside resizing, and what the driver got back."""
    device = torch.device("cuda", torch.cuda.current_device())
    model = random_llama(LLAMA_8B, device, _CONTEXT_TOKENS)
    memory = open_page_memory(_POOL_BYTES, model.layout, device)
    limits = EngineLimits(max_running=_BATCH, max_step_tokens=1024, context_tokens=_CONTEXT_TOKENS)
    engine = FusedEngine(model, memory.pages.tensor, limits, NoLayerEvents())
    engine.capture()
    try:
        _steps(engine, model.layout.layers, 10)
        alone_ms = _steps(engine, model.layout.layers, _STEPS)
        stop = threading.Event()
        took_ms: list[float] = []
        resizing = threading.Thread(target=_resize_until, args=(memory, stop, took_ms))
        resizing.start()
        beside_ms = _steps(engine, model.layout.layers, _STEPS)
        stop.set()
        resizing.join()
        given_bytes, held_bytes = _given_back(memory, device)
    finally:
        memory.close()
    return [
        _row("50th", 50, beside_ms, alone_ms),
        _row("99th", 99, beside_ms, alone_ms),
        Row(
            "longest step while resizing",
            max(beside_ms),
            "ms",
            max(beside_ms) / statistics.median(alone_ms),
            "median step",
        ),
        Row("resizes meanwhile, each by 2 GiB", len(took_ms), "", None, f"median {statistics.median(took_ms):.1f} ms"),
        Row(
            "given back by a shrink of 2 GiB",
            given_bytes / GIB,
            "GiB",
            given_bytes / held_bytes,
            "as the driver counts",
        ),
    ]


def _row(name: str, percent: int, beside_ms: list[float], alone_ms: list[float]) -> Row:
    beside, alone = (statistics.quantiles(times, n=100)[percent - 1] for times in (beside_ms, alone_ms))
    return Row(f"step while resizing, {name} percentile", beside, "ms", beside / alone, f"{alone:.2f} ms alone")


def _steps(engine: FusedEngine, layers: int, count: int) -> list[float]:
    """Wall time of each step of a loop that plans ahead."""
    sequences = Sequences(layers, _BATCH, _LENGTH + count + 2)
    launched = engine.launch(sequences.decode(0, _LENGTH))
    times: list[float] = []
    began_s = time.perf_counter()
    for number in range(1, count + 1):
        following = engine.launch(sequences.decode(number, _LENGTH + number))
        engine.collect(launched)
        launched = following
        times.append((time.perf_counter() - began_s) * 1e3)
        began_s = time.perf_counter()
    engine.collect(launched)
    return times[2:]


def _resize_until(memory: PageMemory, stop: threading.Event, took_ms: list[float]) -> None:
    chunks = memory.plan.chunks
    smaller = chunks - _CHANGE_BYTES // memory.plan.chunk_bytes
    while not stop.is_set():
        for target in (smaller, chunks):
            began_s = time.perf_counter()
            memory.resize(target)
            took_ms.append((time.perf_counter() - began_s) * 1e3)


def _given_back(memory: PageMemory, device: torch.device) -> tuple[int, int]:
    """(bytes more that the driver has free, bytes of the chunks that left)."""
    chunks = memory.plan.chunks
    before_bytes = torch.cuda.mem_get_info(device)[0]
    change = _CHANGE_BYTES // memory.plan.chunk_bytes
    memory.resize(chunks - change)
    return torch.cuda.mem_get_info(device)[0] - before_bytes, change * memory.plan.chunk_bytes
