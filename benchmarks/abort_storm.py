"""A thousand aborts per memory policy over workers with little memory, every page checked: wrong tokens, pages, leaks.

Requests with shared beginnings go from two prefill workers to one decode worker, and to a mixed one, beside a KV store. About two
thirds are aborted: by Cancel in each phase in turn, held exactly there, or by a deadline. Any wrong token, mismatch, leak or
error that nobody asked for ends the run. Real workers, as threads of one process; times are of this machine.
"""

import argparse
import tempfile
import time
from pathlib import Path

from tests.support.storm import PHASES, Tally, make_asked
from tests.support.storm_rig import POLICIES, storm_rig


def main() -> None:
    """Print one line per policy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--aborts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policies", nargs="*", choices=tuple(POLICIES), default=tuple(POLICIES))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked = make_asked(folder)
        results: dict[str, tuple[Tally, float]] = {}
        for policy in given.policies:
            with storm_rig(folder, asked, POLICIES[policy]) as rig:
                began_s = time.monotonic()
                results[policy] = (rig.storm(given.seed).run(given.aborts), time.monotonic() - began_s)
                print(describe(policy, *results[policy]), flush=True)
    total = sum(tally.aborts for tally, _ in results.values())
    print(f"all: {total} aborts, 0 wrong tokens, 0 mismatches, 0 held afterwards")


def describe(policy: str, tally: Tally, took_s: float) -> str:
    """What became of one storm."""
    by_phase = ", ".join(f"{phase} {tally.aborted[phase]}" for phase in (*PHASES, "deadline"))
    return (
        f"{policy}: {tally.aborts} aborts ({by_phase}); {tally.finished} finished, {tally.cached} of them on kept KV; "
        f"{tally.checked_pages} pages checked; slowest answer {tally.slowest_s:.1f} s; "
        f"all free after {tally.freed_s * 1e3:.0f} ms; {took_s:.0f} s"
    )


if __name__ == "__main__":
    main()
