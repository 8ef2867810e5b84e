"""The whole kill matrix in one command: prints a row per cell, writes the table, ends with 1 if a cell does not hold.

python -m tests.faults.matrix --table matrix.md
python -m tests.faults.matrix --only gateway/answer/kill --only decode/decode/cut --keep-logs logs
python -m tests.faults.matrix --memory --limit-s 1200
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from services.worker.model.make import make_model
from tests.faults.matrix.cells import ALL, CHOSEN, VICTIMS, Cell, Mode, cell_named
from tests.faults.matrix.system import Setup, System, running
from tests.faults.matrix.table import HEADLINE, line, markdown, summary
from tests.faults.matrix.trial import LONG_TOKENS, Asked, Outcome, Trial
from tests.support.namespaces import network, why_not

POLICIES = {
    "kv_layout": "virtual",
    "elastic": "full",
    "layer_offload": "auto",
    "spare_memory": "release",
    "admission": "slo",
    "device_memory": "32MiB",
    "host_buffer": "32MiB",
}
"""Every memory policy that prefill and decode workers take, and room for the scratch of their steps."""
_LONG_WITH_POLICIES_TOKENS = 600
"""Blocks that can be mapped one by one have 256 tokens."""


def main(words: Sequence[str]) -> int:
    """The exit code."""
    options = _parser().parse_args(words)
    cells = _chosen(options)
    workers: dict[str, object] = {"transport": options.transport}
    if options.memory:
        workers |= POLICIES
    setup = Setup(workers=workers)
    if options.verify_kv:
        workers["verify_kv"] = "true"
        setup = Setup(workers=workers, roles={"kvstore": {"verify_kv": "true"}})
    reason = why_not()
    if reason:
        print(f"no cuts: {reason}", file=sys.stderr)
        cells = [cell for cell in cells if cell.mode is not Mode.CUT]
    with ExitStack() as stack:
        folder = options.keep_logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-matrix-")))
        folder.mkdir(parents=True, exist_ok=True)
        model = folder / "model"
        if not model.exists():
            make_model("tiny", model, family="llama", dtype="float32")
        asked = Asked(model, _LONG_WITH_POLICIES_TOKENS if options.memory else LONG_TOKENS)
        net = None if reason else stack.enter_context(network())
        system = stack.enter_context(running(folder, model, setup, net))
        outcomes = run(system, asked, cells, options.limit_s)
    print(summary(outcomes))
    if options.table is not None:
        how = f"`python -m tests.faults.matrix {' '.join(words)}`: {len(outcomes)} of {len(cells)} cells were run."
        options.table.write_text(markdown(outcomes, how))
    return 0 if outcomes and all(outcome.ok for outcome in outcomes) else 1


def run(system: System, asked: Asked, cells: Sequence[Cell], limit_s: float) -> list[Outcome]:
    """One after another, until the time is over."""
    began_s, outcomes = time.monotonic(), list[Outcome]()
    print(HEADLINE, flush=True)
    for cell in cells:
        if time.monotonic() - began_s > limit_s:
            print(f"{limit_s:g} s are over after {len(outcomes)} of {len(cells)} cells", flush=True)
            break
        outcomes.append(Trial(system, asked, cell).run())
        print(line(outcomes[-1]), flush=True)
    return outcomes


def _chosen(options: argparse.Namespace) -> list[Cell]:
    if options.only:
        return [cell_named(text) for text in options.only]
    cells = [cell for cell in (CHOSEN if options.chosen else ALL) if cell.victim in options.victims.split(",")]
    random.Random(options.seed).shuffle(cells)  # a run that is cut short has seen something of everything
    return cells


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.faults.matrix", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", action="append", metavar="VICTIM/PHASE/MODE", help="only this cell; may be given again"
    )
    parser.add_argument("--victims", default=",".join(VICTIMS), help="only these")
    parser.add_argument("--chosen", action="store_true", help="the cells of `make test` instead of all")
    parser.add_argument("--memory", action="store_true", help="with every memory policy on")
    parser.add_argument("--verify-kv", action="store_true", help="with checked KV")
    parser.add_argument("--transport", choices=("auto", "tcp"), default="auto", help="how KV travels between workers")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="begin no cell after so many seconds")
    parser.add_argument("--seed", type=int, default=8, help="of the order of cells")
    parser.add_argument("--table", type=Path, help="write the table there, in Markdown")
    parser.add_argument("--keep-logs", type=Path, help="folder for the processes' logs; unset: thrown away")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
