"""Prefill and decode in two processes on one GPU beside two mixed workers there: TTFT and TPOT under the same load.

One GPU is shared: both processes' kernels run on the same units, so this shows what separation costs and what it does
to the tails, not what two GPUs would give.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.table import Row, run_and_write
from services.worker.model.make import make_model

_RATES = (8.0, 24.0)
_QUICK_RATES = (8.0,)
_LIMIT_S = 110
_KEYS = ("median_ttft_ms", "p95_ttft_ms", "median_tpot_ms", "p95_tpot_ms", "p95_itl_ms", "output_throughput")


def run(quick: bool) -> list[Row]:
    """The 0.5B shape, prompts of about 1,000 tokens, answers of about 64."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model("small", Path(scratch) / "small")
        for rate in _QUICK_RATES if quick else _RATES:
            rows += _compared(model, rate, Path(scratch) / f"rate-{rate:g}")
    return rows


def _compared(model: Path, rate: float, out: Path) -> list[Row]:
    flags = f"--model {model} --device cuda --device-memory 8GiB --host-memory 1GiB"
    command = [
        *(sys.executable, "-m", "services.launcher.cli", "bench", "run", "--cluster", "1P1D", "--baseline", "mixed"),
        *("--cluster-flags", flags, "--rate", f"{rate:g}", "--num-requests", f"{int(rate * 12)}", "--warmup", "8"),
        *("--isl", "512-1536", "--osl", "32-96", "--seed", "1", "--out", str(out), "--no-html"),
    ]
    subprocess.run(command, check=True, timeout=_LIMIT_S, stdout=sys.stdout, stderr=sys.stderr)
    apart, mixed = (json.loads((out / name / "result.json").read_text()) for name in ("1P1D", "2M"))
    rows = [Row(f"rate {rate:g}: completed apart / mixed", apart["completed"], "", None, str(mixed["completed"]))]
    for key in _KEYS:
        if apart.get(key) is None or not mixed.get(key):
            continue
        unit = "ms" if key.endswith("_ms") else "tokens/s"
        rows.append(Row(f"rate {rate:g}: {key}", apart[key], unit, apart[key] / mixed[key], "two mixed workers"))
    return rows


if __name__ == "__main__":
    run_and_write(run, __doc__)
