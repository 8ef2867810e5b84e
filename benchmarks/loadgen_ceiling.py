"""How many streams a `penstock bench` process holds before it delays them itself, and what each token costs it.

    python -m benchmarks.loadgen_ceiling [--streams 250 500 1000 2000 4000] [--workers 1] [--token-rate 10] [--hold 5]

An open loop against the scripted server, at the rate that keeps so many streams alive: each has 64 tokens at 10 per second.
Send lag is counted by the generator; what it adds to a time between tokens is its own figure less what the server sent,
request by request. Server and generators share this machine's cores: the CPU share of each is given, and a server that was
itself late, or other processes that took the cores (`waited`), spoil a row. Target: 1,000 streams with a median send lag
within 5 % of the gap between requests.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import psutil

from benchmarks._loadgen_tools import PENSTOCK_CODES, Load, Target, penstock_command
from benchmarks._scripted_server import Truth
from benchmarks._scripted_truth import lateness_s, scripted_server
from loadgen.output.files import load as load_result
from loadgen.results.result import Result

TARGET_STREAMS, TARGET_LAG = 1_000, 0.05
OUTPUT_TOKENS = 64
"""Of each stream."""
_TTFT_MS = 100.0
_PATIENCE_S, _SAMPLE_S = 300.0, 0.25
_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Row:
    """One rate, by all generator processes together."""

    workers: int
    streams_asked: int
    streams_peak: int
    """Most streams open at once, as the server saw it."""
    rate_per_s: float
    tokens_per_s: float
    """While all streams were there."""
    lag_p50_ms: float
    lag_p99_ms: float
    lag_share: float
    """Median send lag over the gap between sends; sends ahead of their time are negative."""
    off_share: float
    """Median of |sent - due| over that gap."""
    ttft_added_p50_ms: float
    """Its figure less the server's, request by request: both ways through the kernel, waking up and reading."""
    ttft_added_p99_ms: float
    itl_mean_error: float
    """Mean time between tokens over the server's, less 1."""
    gap_spread_p99_ms: float
    """p99 of |gap seen - gap sent| over all gaps: jitter that the generator made."""
    generator_cores: float
    """Used by all its processes while all streams were there."""
    waited_cores: float
    """How many more it could have used meanwhile, had other processes not had them: not its own fault."""
    server_cores: float
    server_late_p99_ms: float
    failed: int
    load_average: float


@dataclass(frozen=True)
class _Usage:
    """Seconds until then: of CPU time, and of waiting for a CPU that other processes had."""

    at_s: float
    generator: float
    """All its processes."""
    server: float
    waited: float
    """All processes of the generator."""


@dataclass(frozen=True)
class _Window:
    """When all streams were there."""

    begin_s: float
    end_s: float

    def holds(self, at_s: float) -> bool:
        return self.begin_s <= at_s <= self.end_s


def measure(streams: int, workers: int, token_rate: float, hold_s: float, folder: Path) -> Row:
    """One rate, until all streams are there, and on for `hold_s`. Raises SystemExit if the generator failed."""
    stream_s = _TTFT_MS / 1e3 + (OUTPUT_TOKENS - 1) / token_rate
    rate_per_s = streams / stream_s
    load = Load(None, rate_per_s, round(rate_per_s * (stream_s + hold_s)), 16, OUTPUT_TOKENS, "completions")
    with scripted_server(ttft_ms=_TTFT_MS, itl_ms=1e3 / token_rate) as server:
        command = [*penstock_command(load, Target(server.url, server.model, folder), folder), "--workers", str(workers)]
        with (folder / "errors").open("wb") as errors:
            generator = psutil.Popen(command, cwd=_ROOT, stderr=errors)
            usage = _watch(generator, psutil.Process(server.pid))
        if generator.wait(timeout=_PATIENCE_S) not in PENSTOCK_CODES:
            raise SystemExit(f"the generator ended with {generator.returncode}: {(folder / 'errors').read_text()}")
        truth = server.take_truth()
    full = _Window(min(request.arrival_s for request in truth.requests) + stream_s, truth.requests[-1].arrival_s)
    return _row(load_result(folder), truth, full, usage, streams)


def _watch(generator: psutil.Popen, server: psutil.Process) -> list[_Usage]:
    """Samples until the generator has ended."""
    found: list[_Usage] = []
    while generator.poll() is None:
        with suppress(psutil.NoSuchProcess, OSError):
            processes = [generator, *generator.children(recursive=True)]
            waited_s = sum(map(_waited_s, processes))
            found.append(_Usage(time.monotonic(), sum(map(_cpu_s, processes)), _cpu_s(server), waited_s))
        time.sleep(_SAMPLE_S)
    return found


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _waited_s(process: psutil.Process) -> float:
    """Of its main thread, by Linux' scheduler."""
    return int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[1]) / 1e9


def _cores(usage: Sequence[_Usage], name: str) -> float:
    if len(usage) < 2:
        return float("nan")
    first, last = usage[0], usage[-1]
    used: float = getattr(last, name) - getattr(first, name)
    return used / (last.at_s - first.at_s)


def _row(result: Result, truth: Truth, full: _Window, usage: Sequence[_Usage], streams: int) -> Row:
    load, health = result.facts.request_rate, result.health
    assert load is not None
    off_s = np.array([record.send_lag_s for record in result.records])
    added_s, seen_s, sent_s = _beside_truth(result, truth)
    tokens = sum(map(full.holds, (at_s for request in truth.requests for at_s in request.sent_s)))
    while_full = [one for one in usage if full.holds(one.at_s)]
    late_s = lateness_s(truth)
    return Row(
        workers=health.processes,
        streams_asked=streams,
        streams_peak=_peak(truth),
        rate_per_s=load,
        tokens_per_s=tokens / (full.end_s - full.begin_s),
        lag_p50_ms=1e3 * float(np.median(off_s)),
        lag_p99_ms=1e3 * float(np.percentile(off_s, 99)),
        lag_share=float(np.median(off_s)) * load,
        off_share=float(np.median(np.abs(off_s))) * load,
        ttft_added_p50_ms=1e3 * float(np.median(added_s)),
        ttft_added_p99_ms=1e3 * float(np.percentile(added_s, 99)),
        itl_mean_error=float(np.mean(seen_s) / np.mean(sent_s)) - 1,
        gap_spread_p99_ms=1e3 * float(np.percentile(np.abs(np.subtract(seen_s, sent_s)), 99)),
        generator_cores=_cores(while_full, "generator"),
        waited_cores=_cores(while_full, "waited"),
        server_cores=_cores(while_full, "server"),
        server_late_p99_ms=1e3 * late_s[int(0.99 * len(late_s))],
        failed=result.summary.failed + truth.overrun,
        load_average=os.getloadavg()[0],
    )


def _beside_truth(result: Result, truth: Truth) -> tuple[list[float], list[float], list[float]]:
    """Added to each TTFT, gaps seen and the same gaps as sent, of all requests that both know whole; seconds."""
    true_by_id = {request.request_id: request for request in truth.requests}
    added_s, seen_s, sent_s = [], [], []
    for record in result.records:
        true, ttft_s, gaps_s = true_by_id.get(record.request_id), record.ttft_s, record.token_gaps_s()
        if true is None or ttft_s is None or len(gaps_s) != len(true.sent_s) - 1:
            continue
        added_s.append(ttft_s - (true.sent_s[0] - true.arrival_s))
        seen_s += gaps_s
        sent_s += [later - sooner for sooner, later in pairwise(true.sent_s)]
    return added_s, seen_s, sent_s


def _peak(truth: Truth) -> int:
    changes = [(request.arrival_s, 1) for request in truth.requests]
    changes += [(request.sent_s[-1], -1) for request in truth.requests if request.sent_s]
    return max(accumulate(change for _, change in sorted(changes)))


_COLUMNS = (
    ("streams", "streams_asked", "7d"),
    ("peak", "streams_peak", "6d"),
    ("sends/s", "rate_per_s", "8.1f"),
    ("tokens/s", "tokens_per_s", "9.0f"),
    ("lag p50 ms", "lag_p50_ms", "11.2f"),
    ("p99", "lag_p99_ms", "7.2f"),
    ("of gap", "lag_share", "7.1%"),
    ("|off| of gap", "off_share", "13.1%"),
    ("TTFT + p50 ms", "ttft_added_p50_ms", "14.2f"),
    ("p99", "ttft_added_p99_ms", "7.2f"),
    ("ITL error", "itl_mean_error", "10.2%"),
    ("gap +- p99 ms", "gap_spread_p99_ms", "14.2f"),
    ("cores", "generator_cores", "6.2f"),
    ("waited", "waited_cores", "7.2f"),
    ("server", "server_cores", "7.2f"),
    ("late p99 ms", "server_late_p99_ms", "12.2f"),
    ("failed", "failed", "7d"),
    ("load", "load_average", "5.1f"),
)


def main(argv: Sequence[str]) -> int:
    """Print a row per rate, and write them as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[250, 500, 1_000, 2_000, 4_000])
    parser.add_argument("--workers", type=int, default=1, help="generator processes that share the rate")
    parser.add_argument("--token-rate", type=float, default=10.0, help="tokens per second of each stream")
    parser.add_argument("--hold", type=float, default=5.0, help="seconds with all streams alive")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    print("".join(f"{title:>{int(form.split('.')[0].rstrip('d'))}}" for title, _, form in _COLUMNS), flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for streams in options.streams:
            there = Path(folder) / str(streams)
            there.mkdir()
            row = measure(streams, options.workers, options.token_rate, options.hold, there)
            rows.append(row)
            print("".join(format(getattr(row, name), form) for _, name, form in _COLUMNS), flush=True)
    held = max((row.streams_peak for row in rows if row.lag_share <= TARGET_LAG and not row.failed), default=0)
    print(f"held with a median send lag within {TARGET_LAG:.0%} of the gap: {held} streams (target {TARGET_STREAMS})")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
