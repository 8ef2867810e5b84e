"""One experiment of benchmarks.gpu.vmm in this process: python -m benchmarks.gpu._vmm_one NAME [--quick]."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict

from benchmarks.gpu import _vmm_calls, _vmm_sharing, _vmm_tensors
from benchmarks.gpu.table import Row

EXPERIMENTS: dict[str, Callable[[bool], list[Row]]] = {
    "two_processes": _vmm_sharing.two_processes,
    "offset": _vmm_sharing.offset_into_handle,
    "tensors": _vmm_tensors.over_partly_mapped,
    "calls": _vmm_calls.call_costs,
    "under_load": _vmm_calls.under_load,
    "mixed_range": _vmm_tensors.device_and_host,
    "aliases": _vmm_sharing.aliases,
}

if __name__ == "__main__":
    print(json.dumps([asdict(row) for row in EXPERIMENTS[sys.argv[1]]("--quick" in sys.argv)]))
