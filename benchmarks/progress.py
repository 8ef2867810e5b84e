"""Random work on workers whose memory is too small for it: whether all of it ends, in how many steps, after what waiting.

    python -m benchmarks.progress [--schedules 10000] [--seed0 0] [--processes 1]

No process, no engine: the real cores of a prefill, a decode and two mixed workers and of a KV store, in virtual time, with
parking, elastic memory, layer offload, failing loads and priorities in random mixtures. The laws are those of
tests/support/world_progress.py; a schedule that breaks one is named by its number, and run again by --seed0 NUMBER
--schedules 1. Every `--every` schedules a line says how far it is, so a run that was ended goes on with --seed0. The last
line is a row of a table. Exit code 1 if a law was broken.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.support.world_progress import STEPS_ALWAYS, Progress, run


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one schedule."""

    number: int
    progress: Progress | None
    problem: str


def attempt(number: int) -> Outcome:
    """One schedule; a broken law is a result."""
    try:
        return Outcome(number, run(number), "")
    except (AssertionError, RuntimeError) as error:
        return Outcome(number, None, f"{type(error).__name__}: {error}")


def told(outcomes: Iterable[Outcome], seed0: int, every: int) -> Iterator[Outcome]:
    """The same, with a line now and then, and at once for a broken law."""
    broken, began_s = 0, time.monotonic()
    for n, one in enumerate(outcomes, start=1):
        if one.problem:
            broken += 1
            print(f"schedule {one.number}: {one.problem.splitlines()[0]}", flush=True)
        if n % every == 0:
            rate = n / (time.monotonic() - began_s)
            print(f"{n} schedules, {broken} broken, {rate:.1f} per s; go on with --seed0 {seed0 + n}", flush=True)
        yield one


def report(outcomes: list[Outcome], elapsed_s: float) -> int:
    """Print counts and the worst; the exit code."""
    good = [one.progress for one in outcomes if one.progress is not None]
    bad = [one for one in outcomes if one.problem]
    requests, failed = sum(one.requests for one in good), sum(one.failed for one in good)
    print(f"{len(outcomes)} schedules, {requests} requests, {elapsed_s:.0f} s")
    if good:
        share = max(max(0, one.steps - STEPS_ALWAYS) / one.tokens for one in good)
        print(f"ended with the right tokens: {requests - failed}; with a named error: {failed}")
        print(f"most engine steps in one schedule: {max(one.steps for one in good)}")
        print(f"most steps above {STEPS_ALWAYS}, per token of prompts and answers: {share:.2f}")
        print(f"longest time with nothing to do but wait: {max(one.waits_ms for one in good) / 1000:.1f} s")
    numbers = f"{outcomes[0].number} to {outcomes[-1].number}" if outcomes else "none"
    print("| schedules | requests | named errors | broken laws | s |")
    print(f"| {numbers} | {requests} | {failed} | {len(bad)} | {elapsed_s:.0f} |")
    return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--seed0", type=int, default=0, help="The first schedule's number.")
    parser.add_argument("--every", type=int, default=100, help="Schedules between two lines.")
    parser.add_argument("--processes", type=int, default=1)
    flags = parser.parse_args()
    numbers, began_s = range(flags.seed0, flags.seed0 + flags.schedules), time.monotonic()
    if flags.processes == 1:
        return report(list(told(map(attempt, numbers), flags.seed0, flags.every)), time.monotonic() - began_s)
    with multiprocessing.get_context("spawn").Pool(flags.processes) as pool:
        outcomes = list(told(pool.imap(attempt, numbers, chunksize=20), flags.seed0, flags.every))
    return report(outcomes, time.monotonic() - began_s)


if __name__ == "__main__":
    sys.exit(main())
