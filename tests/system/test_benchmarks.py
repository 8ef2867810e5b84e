"""Benchmarks are run by hand, and must not have rotted by then."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "benchmarks/gpu").glob("*.py")])


@pytest.mark.system
def test_every_benchmark_can_be_imported() -> None:
    for path in BENCHMARKS:
        if path.stem not in ("__main__", "_dynamo_radix"):  # that one runs in a peer's own environment
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
