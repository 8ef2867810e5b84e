"""Memory of a prompt computed in one step, beside weights and KV: the engine over `transformers`, same checkpoint, same run.

    python -m benchmarks.scratch [--model DIR] [--rows 1024,4096] [--threads 1] [--json FILE]

Each number is from a process of its own: by how much its memory's high-water mark rose over what it held before the
step (Linux, VmHWM), KV pages touched beforehand; `transformers` keeps no KV here and computes the last row's logits only.
`taken` is what the engine counted, `terms` what its ScratchTerms say that it needs. Times are of the processor, the
second of two steps. Without --model a `mini` checkpoint is made.
"""

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from common.ids import RequestId
from common.messages.requests import Sampling
from common.units import MIB
from kvstore.index.page_table import PageTable
from services.worker.core.plan import Segment, StepPlan
from services.worker.engine.engine import TorchEngine
from services.worker.engine.make import EngineLimits, make_engine
from services.worker.engine.torch_options import configure_torch
from services.worker.model.load import load_model
from services.worker.model.make import make_model

TARGET_RATIO = 0.5
"""Of memory, engine over transformers, at the most rows."""
_WARM_ROWS = 16


@dataclass(frozen=True)
class Cost:
    """Of one step."""

    rose_bytes: int
    cpu_s: float
    taken_bytes: int = 0
    terms_bytes: int = 0


@dataclass(frozen=True)
class Comparison:
    """One number of rows."""

    rows: int
    engine: Cost
    reference: Cost
    memory_ratio: float
    time_ratio: float
    taken_over_terms: float


def high_water_bytes() -> int:
    """The most memory that this process held since the mark was reset."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "Linux says so"
    return int(found[1]) * 1024


def cost_of(step: Callable[[], object]) -> Cost:
    """Of the dearer of two, in memory; of the second, in time."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before_bytes = high_water_bytes()
    step()
    began_s = time.process_time()
    step()
    return Cost(high_water_bytes() - before_bytes, time.process_time() - began_s)


def engine_cost(folder: str, rows: int, threads: int) -> Cost:
    """Of our engine."""
    configure_torch(threads)
    model = load_model(folder)
    layout = model.layout
    shape = (layout.pages_for(rows), layout.block_tokens, 2, layout.kv_heads, layout.head_dim)
    pages = torch.ones(shape, dtype=model.dtype)
    limits = EngineLimits(max_running=1, max_step_tokens=rows, context_tokens=rows)
    engine = make_engine(model, pages, limits)
    assert isinstance(engine, TorchEngine), "on a CPU"
    table = PageTable(layout.layers)
    table.append(np.arange(layout.pages_for(rows), dtype=np.int32).reshape(-1, layout.layers))
    tokens = [7 + number % 1000 for number in range(rows)]

    def plan(count: int) -> StepPlan:
        request = RequestId("prompt")
        return StepPlan(1, (Segment(request, tokens, rows, 0, count, table, Sampling(max_tokens=1), True),))

    engine.step(plan(_WARM_ROWS))
    cost = cost_of(lambda: engine.step(plan(rows)))
    return Cost(cost.rose_bytes, cost.cpu_s, engine.scratch_peak_bytes, engine.scratch_terms.needs_bytes(rows, rows))


def reference_cost(folder: str, rows: int, threads: int) -> Cost:
    """Of transformers."""
    configure_torch(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ids = torch.tensor([[7 + number % 1000 for number in range(rows)]])
    with torch.inference_mode():
        model(ids[:, :_WARM_ROWS], use_cache=False, logits_to_keep=1)
        return cost_of(lambda: model(ids, use_cache=False, logits_to_keep=1))


def compare(folder: str, rows: int, threads: int) -> Comparison:
    """Both sides, each in a new process."""
    found = []
    for side in (engine_cost, reference_cost):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            found.append(process.submit(side, folder, rows, threads).result())
    engine, reference = found
    return Comparison(
        rows,
        engine,
        reference,
        engine.rose_bytes / reference.rose_bytes,
        engine.cpu_s / reference.cpu_s,
        engine.taken_bytes / engine.terms_bytes,
    )


def print_table(results: Sequence[Comparison]) -> None:
    print(
        f"{'rows':>6}{'engine MiB':>12}{'transformers':>14}{'ratio':>8}{'taken MiB':>11}{'of terms':>10}{'cpu ratio':>11}"
    )
    for one in results:
        print(
            f"{one.rows:>6}{one.engine.rose_bytes / MIB:>12.1f}{one.reference.rose_bytes / MIB:>14.1f}"
            f"{one.memory_ratio:>8.2f}{one.engine.taken_bytes / MIB:>11.1f}{one.taken_over_terms:>10.3f}"
            f"{one.time_ratio:>11.2f}"
        )


def main(argv: Sequence[str]) -> int:
    """Exit code 1 if the target is missed at the most rows."""
    parser = argparse.ArgumentParser(prog="scratch", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=None, help="folder of the checkpoint; default: a new `mini` one")
    parser.add_argument("--rows", default="1024,4096")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None, help="also write the results to this file")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or str(make_model("mini", Path(folder) / "mini"))
        results = [compare(model, int(rows), options.threads) for rows in options.rows.split(",")]
    print_table(results)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n")
    return 0 if results[-1].memory_ratio <= TARGET_RATIO else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
