"""Everything that needs a GPU, in one command: tests first, then benchmarks, then one table.

    python -m benchmarks.gpu [--only kernels,system,vmm,...] [--quick] [--out FOLDER]

Each part runs in a process of its own with a time limit, so that one that fails or hangs costs the others nothing.
Exit code 1 if any part failed. `--out` gets gpu.md, gpu.json and a log for each part.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.table import Row, as_markdown, read_rows

_ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Part:
    """One process."""

    name: str
    arguments: tuple[str, ...]
    limit_s: float
    is_test: bool = False


def _tests(name: str, limit_s: float, *paths: str, processes: int = 1) -> Part:
    """Most of a kernel test is compiling, which several processes do side by side."""
    side_by_side = ("-n", str(processes)) if processes > 1 and find_spec("xdist") else ()
    always = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "--timeout", "120")
    return Part(f"test-{name}", (*always, *side_by_side, *paths), limit_s, is_test=True)


def _benchmark(name: str, limit_s: float) -> Part:
    return Part(name, ("-m", f"benchmarks.gpu.{name}"), limit_s)


PARTS = (
    _tests("kernels", 150, "tests/kernels", processes=6),
    _tests("memory", 150, "tests/kvstore"),
    _tests("engine", 120, "tests/services", processes=4),
    _tests("system", 240, "tests/gpu"),
    _benchmark("vmm", 60),
    _benchmark("attention", 75),
    _benchmark("operators", 45),
    _benchmark("handover", 75),
    _benchmark("engine", 75),
    _benchmark("pool", 45),
    _benchmark("serving", 120),
)


def main() -> int:
    """Run the parts one after the other."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help=f"comma-separated; of {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--out", type=Path, default=Path("/tmp/penstock-gpu"), help="folder for results and logs")
    options = parser.parse_args()
    chosen = _chosen(options.only)
    options.out.mkdir(parents=True, exist_ok=True)
    if (problem := _no_gpu()) is not None:
        print(f"{problem}: nothing was run", file=sys.stderr)
        return 2
    failed: list[str] = []
    rows: dict[str, list[Row]] = {}
    for part in chosen:
        began_s = time.perf_counter()
        code = _run(part, options.out, quick=options.quick)
        rows[part.name] = read_rows(options.out / f"{part.name}.json")
        verdict = "ok" if code == 0 else f"FAILED ({'time limit' if code is None else f'exit code {code}'})"
        print(f"{part.name:14} {verdict} in {time.perf_counter() - began_s:.0f} s", flush=True)
        if code != 0:
            failed.append(part.name)
            print(_tail(options.out / f"{part.name}.log"), flush=True)
    _write(options.out, rows, failed)
    return 1 if failed else 0


def _chosen(only: str | None) -> Sequence[Part]:
    if only is None:
        return PARTS
    names = only.split(",")
    unknown = set(names) - {part.name for part in PARTS}
    if unknown:
        sys.exit(f"--only: {', '.join(sorted(unknown))}: there are {', '.join(part.name for part in PARTS)}")
    return [part for part in PARTS if part.name in names]


def _no_gpu() -> str | None:
    """Why GPU code cannot run with this interpreter; None: it can."""
    if find_spec("torch") is None:
        return f"{sys.executable} has no torch; name an interpreter that has, with GPU_PYTHON=..."
    asks = "import torch; raise SystemExit(not torch.cuda.is_available())"
    found = subprocess.run([sys.executable, "-c", asks], check=False)
    return None if found.returncode == 0 else f"no CUDA device is visible to the torch of {sys.executable}"


def _run(part: Part, out: Path, *, quick: bool) -> int | None:
    """Exit code; None if it ran out of time."""
    arguments = list(part.arguments)
    if not part.is_test:
        arguments += ["--json", str(out / f"{part.name}.json"), *(["--quick"] if quick else [])]
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (out / f"{part.name}.log").open("w") as log:
        try:
            return subprocess.run(
                [sys.executable, *arguments],
                cwd=_ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=part.limit_s,
                env={**os.environ, "PYTHONPATH": path},
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return None


def _tail(log: Path, n_chars: int = 2500) -> str:
    return log.read_text(errors="replace")[-n_chars:]


def _write(out: Path, rows: dict[str, list[Row]], failed: list[str]) -> None:
    text = as_markdown({name: found for name, found in rows.items() if found})
    if failed:
        text += f"\nFailed: {', '.join(failed)}\n"
    (out / "gpu.md").write_text(text)
    (out / "gpu.json").write_text(json.dumps({name: [vars(row) for row in found] for name, found in rows.items()}))
    print(text)


if __name__ == "__main__":
    sys.exit(main())
