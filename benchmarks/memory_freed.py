"""Memory that a varying load leaves to others: a sine of requests, and what the pool has of the system meanwhile.

    python -m benchmarks.memory_freed [--spare-memory keep|release] [--kv-layout paged|virtual] [--minutes 3] [--json FILE]

A real gateway and mixed worker. Requests come as a Poisson process whose rate goes from 0 to `--peak-rate` and back,
`--periods` times; each prompt is new. Once a second: the worker's memory report, and what the kernel has given the pool's
file (`st_blocks`), so that what is reported as released is gone indeed. vTensor (arXiv 2407.15309) calls this flexibility and
frees 71 % of an A100's 80 GB on average, against a reservation that nobody gives back.

    freed %     = 1 - mean(resident) / reserved             by the report, and by the kernel
    spare %     = 1 - mean(KV of requests and kept for reuse) / reserved        what could be freed at the most
"""

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks._serving import Answer, Serving, serving
from common.memory_modes import KV_LAYOUTS, SPARE_MEMORY
from common.units import MIB
from services.worker.model.make import PRESETS, make_model
from tests.support.clients import status

WORKER = "mixed-0"
PROMPT_TOKENS, ANSWER_TOKENS = (64, 512), (64, 256)
EVERY_S = 1.0
MOST_APART = 0.05
"""Of the reservation: report and kernel may differ by so much on average, as they are looked at at different moments."""
_MOST_OPEN = 256
_ROWS = 30


@dataclass(frozen=True, slots=True)
class Look:
    """The pool at one moment, in bytes."""

    at_s: float
    reserved_bytes: int
    kv_bytes: int
    """Of requests, and kept for reuse."""
    released_bytes: int
    kernel_bytes: int
    """What the kernel has given the pool's file."""
    open_requests: int


def rate_at(at_s: float, peak_per_s: float, period_s: float) -> float:
    """Requests per second: 0 at the start of a period, `peak_per_s` in its middle."""
    return peak_per_s * (1 - math.cos(2 * math.pi * at_s / period_s)) / 2


def arrivals_s(peak_per_s: float, period_s: float, length_s: float, rng: random.Random) -> Iterator[float]:
    """A Poisson process of that rate, by thinning (Lewis and Shedler, 1979)."""
    at_s = rng.expovariate(peak_per_s)
    while at_s < length_s:
        if rng.random() * peak_per_s < rate_at(at_s, peak_per_s, period_s):
            yield at_s
        at_s += rng.expovariate(peak_per_s)


def kernel_bytes(pid: int) -> int:
    """Memory in the page files that a process has open, each counted once."""
    files: dict[tuple[int, int], int] = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if os.readlink(entry).startswith("/memfd:penstock-pages"):
                found = entry.stat()
                files[found.st_dev, found.st_ino] = found.st_blocks * 512
        except FileNotFoundError:
            continue  # it was closed while we looked
    return sum(files.values())


def look(system: Serving, at_s: float) -> Look:
    """One look at the worker."""
    worker = status(system.url)[WORKER]
    n_bytes = {part["owner"]: part["bytes"] for part in worker["memory"] if part["tier"] == "device"}
    queue: Mapping[str, int] = worker["queue"]
    return Look(
        at_s=at_s,
        reserved_bytes=int(worker["gauges"]["pool_bytes"]),
        kv_bytes=n_bytes["kv_requests"] + n_bytes["kv_prefix"],
        released_bytes=n_bytes["released"],
        kernel_bytes=kernel_bytes(worker["pid"]),
        open_requests=queue["waiting"] + queue["running"],
    )


def run(system: Serving, options: argparse.Namespace) -> list[Look]:
    """The whole load; a look every second. Raises SystemExit if an answer does not come whole."""
    rng, length_s = random.Random(options.seed), options.minutes * 60
    due = list(arrivals_s(options.peak_rate, length_s / options.periods, length_s, rng))
    looks: list[Look] = []
    asked: list[Future[Answer]] = []
    with ThreadPoolExecutor(_MOST_OPEN) as pool:
        began_s = time.monotonic()
        while (now_s := time.monotonic() - began_s) < length_s:
            while len(asked) < len(due) and due[len(asked)] <= now_s:
                prompt = [rng.randrange(8, 1500) for _ in range(rng.randint(*PROMPT_TOKENS))]
                asked.append(pool.submit(system.ask, prompt, rng.randint(*ANSWER_TOKENS)))
            if now_s >= len(looks) * EVERY_S:
                looks.append(look(system, now_s))
            waits_s = [length_s, len(looks) * EVERY_S, *due[len(asked) : len(asked) + 1]]
            time.sleep(max(0.0, min(waits_s) - (time.monotonic() - began_s)))
        for one in asked:
            one.result()
    return looks


def summary(looks: Sequence[Look]) -> dict[str, float]:
    """Shares of the reservation."""
    reserved = statistics.fmean(look.reserved_bytes for look in looks)
    freed = statistics.fmean(look.released_bytes for look in looks) / reserved
    return {
        "reserved_bytes": reserved,
        "freed_share": freed,
        "freed_share_by_kernel": 1 - statistics.fmean(look.kernel_bytes for look in looks) / reserved,
        "spare_share": 1 - statistics.fmean(look.kv_bytes for look in looks) / reserved,
        "peak_kv_share": max(look.kv_bytes for look in looks) / reserved,
        "most_open_requests": max(look.open_requests for look in looks),
    }


def show(looks: Sequence[Look], found: Mapping[str, float], options: argparse.Namespace) -> None:
    """The trace, thinned out, and the means."""
    period_s = options.minutes * 60 / options.periods
    print(
        f"{'s':>5} {'rate/s':>6} {'open':>4} {'KV MiB':>8} {'resident':>8} {'kernel':>8}   of {found['reserved_bytes'] / MIB:.1f} MiB"
    )
    for one in looks[:: max(1, len(looks) // _ROWS)]:
        resident = one.reserved_bytes - one.released_bytes
        bar = "#" * round(40 * resident / one.reserved_bytes)
        print(
            f"{one.at_s:5.0f} {rate_at(one.at_s, options.peak_rate, period_s):6.1f} {one.open_requests:4} "
            f"{one.kv_bytes / MIB:8.1f} {resident / MIB:8.1f} {one.kernel_bytes / MIB:8.1f}   {bar}"
        )
    print(
        f"freed on average: {found['freed_share']:.1%} by the report, {found['freed_share_by_kernel']:.1%} by the kernel, "
        f"of {found['spare_share']:.1%} that was spare; KV at its peak: {found['peak_kv_share']:.0%} of the pool"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the trace; exit code 1 if report and kernel tell different stories."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="mini")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--periods", type=float, default=2.0)
    parser.add_argument("--peak-rate", type=float, default=4.0, help="requests per second")
    parser.add_argument("--device-memory", default="64MiB")
    parser.add_argument("--kv-layout", choices=KV_LAYOUTS, default="paged")
    parser.add_argument("--spare-memory", choices=SPARE_MEMORY, default="release")
    parser.add_argument("--caching", type=int, default=0, help="above 0, what is kept for reuse stays in the pool")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    passed_on = ("device_memory", "kv_layout", "spare_memory", "caching", "threads")
    flags = {name: getattr(options, name) for name in passed_on}
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        model = make_model(options.preset, folder / options.preset)
        with serving(folder / "run", model, {"mixed": flags}) as system:
            system.ask([8] * PROMPT_TOKENS[1], 2)  # the first step pays for what later ones find made
            looks = run(system, options)
    found = summary(looks)
    show(looks, found, options)
    if options.json is not None:
        rows = [asdict(one) for one in looks]
        options.json.write_text(json.dumps({**flags, **found, "looks": rows}, indent=1) + "\n")
    apart = abs(found["freed_share"] - found["freed_share_by_kernel"])
    if apart > MOST_APART:
        print(f"report and kernel differ by {apart:.1%} of the pool", file=sys.stderr)
    return 1 if apart > MOST_APART else 0


if __name__ == "__main__":
    sys.exit(main())
