"""What CUDA virtual memory costs and allows on this machine: the facts that the page pool's rules rest on.

    python -m benchmarks.gpu.vmm [--quick] [--only NAME ...]

Each experiment runs in a process of its own, because a fault poisons a CUDA context. An experiment that cannot run here
says so in its row.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict

from benchmarks.gpu import _vmm_calls, _vmm_sharing, _vmm_tensors
from benchmarks.gpu.table import Row

_EXPERIMENTS: dict[str, Callable[[bool], list[Row]]] = {
    "calls": _vmm_calls.call_costs,
    "under_load": _vmm_calls.under_load,
    "offset": _vmm_sharing.offset_into_handle,
    "aliases": _vmm_sharing.aliases,
    "two_processes": _vmm_sharing.two_processes,
    "tensors": _vmm_tensors.over_partly_mapped,
    "mixed_range": _vmm_tensors.device_and_host,
}
_LIMIT_S = 40


def run(quick: bool) -> list[Row]:
    """All experiments, one after the other."""
    return [row for name in _EXPERIMENTS for row in _isolated(name, quick)]


def _isolated(name: str, quick: bool) -> list[Row]:
    command = [sys.executable, "-m", "benchmarks.gpu.vmm", "--experiment", name] + ["--quick"] * quick
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return [Row(f"{name}: stopped", float(_LIMIT_S), "s", None, "took too long")]
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return [Row(f"{name}: failed", float(done.returncode), "exit code", None, lines[-1][:300])]
    return [Row(**row) for row in json.loads(done.stdout.strip().splitlines()[-1])]


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--only", nargs="+", choices=_EXPERIMENTS, help="these experiments alone")
    parser.add_argument("--experiment", choices=_EXPERIMENTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.experiment:
        print(json.dumps([asdict(row) for row in _EXPERIMENTS[options.experiment](options.quick)]))
        return
    for name in options.only or _EXPERIMENTS:
        for row in _isolated(name, options.quick):
            ratio = "" if row.ratio is None else f"{row.ratio:.2f} x "
            print(f"{row.name:<58} {row.value:>14.3f} {row.unit:<8} {ratio}{row.against}", flush=True)


if __name__ == "__main__":
    main()
