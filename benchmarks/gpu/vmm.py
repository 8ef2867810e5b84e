"""What CUDA virtual memory costs and allows on this machine: the facts that the page pool's rules rest on.

    python -m benchmarks.gpu.vmm [--quick] [--json FILE]

Each experiment runs in a process of its own (`python -m benchmarks.gpu._vmm_one NAME` runs one), because a fault poisons
a CUDA context. An experiment that cannot run here says so in its row.
"""

import json
import subprocess
import sys
import time

from benchmarks.gpu._vmm_one import EXPERIMENTS
from benchmarks.gpu.table import Row, run_and_write

_ALL_S = 55.0


def run(quick: bool) -> list[Row]:
    """All experiments, one after the other, as far as the time goes."""
    until_s = time.monotonic() + _ALL_S
    return [row for name in EXPERIMENTS for row in _isolated(name, quick, until_s - time.monotonic())]


def _isolated(name: str, quick: bool, limit_s: float) -> list[Row]:
    if limit_s < 1:
        return [Row(f"{name}: left out", float("nan"), "", None, "the others took all the time")]
    command = [sys.executable, "-m", "benchmarks.gpu._vmm_one", name] + ["--quick"] * quick
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return [Row(f"{name}: stopped", limit_s, "s", None, "took too long")]
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return [Row(f"{name}: failed", float(done.returncode), "exit code", None, lines[-1][:300].replace("|", "/"))]
    return [Row(**row) for row in json.loads(done.stdout.strip().splitlines()[-1])]


if __name__ == "__main__":
    run_and_write(run, __doc__)
