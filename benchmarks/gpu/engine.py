"""Steps of the engine on an 8B shape over what the card's memory and matrix units allow.

Decode: the floor is every weight and every key and value read once at the measured copy bandwidth. `device` is the time
on the stream, `wall` is the time between steps of a loop that plans ahead, tokens fetched: what users get.
Prefill: the floor is every product at the measured bf16 rate, attention included.
"""

import time

import numpy as np
import torch

from benchmarks.gpu._shapes import LLAMA_8B, random_llama
from benchmarks.gpu.limits import copy_bytes_per_s, matmul_flop_per_s
from benchmarks.gpu.table import Row, run_and_write
from common.ids import RequestId
from common.messages.requests import Sampling
from kvstore.index.page_table import PageTable
from kvstore.transport.layer_events import NoLayerEvents
from services.worker.core.plan import Segment, StepPlan
from services.worker.engine.fused.engine import FusedEngine
from services.worker.engine.make import EngineLimits
from services.worker.model.load import LoadedModel

_CONTEXT_TOKENS = 40_000
_MAX_RUNNING = 128
_BLOCK_TOKENS = 16
_PREFILL_TOKENS = 8192
_DECODES = ((1, 2048), (8, 2048), (32, 2048), (128, 2048), (1, 32_768), (8, 16_384))
_QUICK_DECODES = ((1, 2048), (32, 2048), (128, 2048))
_WARM_STEPS, _STEPS = 5, 40


class Sequences:
    """Tables over a pool, whole blocks one after the other."""

    def __init__(self, layers: int, count: int, tokens: int) -> None:
        blocks = -(-tokens // _BLOCK_TOKENS)
        self.tables: list[PageTable] = []
        for number in range(count):
            table = PageTable(layers)
            first = number * blocks * layers
            table.append(np.arange(first, first + blocks * layers, dtype=np.int32).reshape(blocks, layers))
            self.tables.append(table)

    def decode(self, number: int, length: int) -> StepPlan:
        """A step that computes the token at position `length - 1`, which the step before draws."""
        known = [1] * (length - 1)
        segments = [
            Segment(
                request=RequestId(str(row)),
                tokens=known,
                prompt_tokens=1,
                start=length - 1,
                count=1,
                table=table,
                sampling=Sampling(max_tokens=1 << 30),
                sample=True,
                pending=number > 0,
            )
            for row, table in enumerate(self.tables)
        ]
        if number == 0:
            known.append(1)
        return StepPlan(number, tuple(segments))

    def prefill(self, number: int, start: int, count: int) -> StepPlan:
        """A chunk of the first sequence."""
        tokens = np.random.default_rng(0).integers(5, 100_000, start + count).tolist()
        segment = Segment(
            request=RequestId("0"),
            tokens=tokens,
            prompt_tokens=len(tokens),
            start=start,
            count=count,
            table=self.tables[0],
            sampling=Sampling(max_tokens=1),
            sample=True,
        )
        return StepPlan(number, (segment,))


def decode_rows(engine: FusedEngine, model: LoadedModel, batch: int, length: int) -> list[Row]:
    """Median device time and mean wall time of steps that follow one another."""
    sequences = Sequences(model.layout.layers, batch, length + _WARM_STEPS + _STEPS + 1)
    launched = engine.launch(sequences.decode(0, length))
    device_ms: list[float] = []
    for number in range(1, _WARM_STEPS + _STEPS):
        if number == _WARM_STEPS:
            began_s = time.perf_counter()
        following = engine.launch(sequences.decode(number, length + number))
        device_ms.append(engine.collect(launched).compute_ms)
        launched = following
    wall_ms = (time.perf_counter() - began_s) * 1e3 / _STEPS
    engine.collect(launched)
    layout = model.layout
    kv_bytes = batch * length * layout.layers * layout.page_bytes / layout.block_tokens
    embedding_bytes = LLAMA_8B.vocab_size * LLAMA_8B.hidden_size * 2
    floor_ms = (model.weight_bytes - embedding_bytes + kv_bytes) / copy_bytes_per_s() * 1e3
    median_ms = sorted(device_ms[_WARM_STEPS:])[len(device_ms[_WARM_STEPS:]) // 2]
    name = f"decode step, batch {batch}, {length} tokens each"
    against = f"memory floor {floor_ms:.2f} ms"
    return [
        Row(f"{name}: device", median_ms, "ms", median_ms / floor_ms, against),
        Row(f"{name}: wall", wall_ms, "ms", wall_ms / floor_ms, against),
    ]


def prefill_row(engine: FusedEngine, model: LoadedModel, start: int, count: int) -> Row:
    """One chunk behind `start` cached tokens."""
    sequences = Sequences(model.layout.layers, 1, start + count)
    times = [engine.step(sequences.prefill(number, start, count)).compute_ms for number in range(5)]
    matrices = (model.weight_bytes - 2 * LLAMA_8B.vocab_size * LLAMA_8B.hidden_size * 2) / 2
    pairs = count * start + count * (count + 1) / 2
    attention = 4 * pairs * LLAMA_8B.hidden_size * LLAMA_8B.num_hidden_layers
    floor_ms = (2 * matrices * count + attention) / matmul_flop_per_s() * 1e3
    median_ms = sorted(times[1:])[2]
    name = f"prefill of {count} tokens behind {start}"
    return Row(name, count / median_ms * 1e3, "tokens/s", floor_ms / median_ms, f"matrix limit, {floor_ms:.1f} ms")


def run(quick: bool) -> list[Row]:
    """Build the model and time steps."""
    device = torch.device("cuda")
    copy_bytes_per_s(), matmul_flop_per_s()
    model = random_llama(LLAMA_8B, device, _CONTEXT_TOKENS)
    layout = model.layout
    decodes = _QUICK_DECODES if quick else _DECODES
    largest = max(batch * layout.pages_for(length + _WARM_STEPS + _STEPS + 1) for batch, length in decodes)
    pages = torch.empty(
        largest, layout.block_tokens, 2, layout.kv_heads, layout.head_dim, dtype=torch.bfloat16, device=device
    ).normal_()
    limits = EngineLimits(max_running=_MAX_RUNNING, max_step_tokens=_PREFILL_TOKENS, context_tokens=_CONTEXT_TOKENS)
    engine = FusedEngine(model, pages, limits, NoLayerEvents())
    began_s = time.perf_counter()
    graphs = engine.capture()
    rows = [Row(f"capture of {graphs} graphs", time.perf_counter() - began_s, "s", None, "at start, once")]
    for batch, length in decodes:
        rows += decode_rows(engine, model, batch, length)
    for start, count in ((0, 512), (0, 2048), (0, 8192), (24_576, 8192)):
        rows.append(prefill_row(engine, model, start, count))
    return rows


if __name__ == "__main__":
    run_and_write(run, __doc__)
