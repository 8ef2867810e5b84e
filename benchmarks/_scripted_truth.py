"""The scripted server as a process of its own, and what it says really happened, in the words of the load generators."""

import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np

from benchmarks._loadgen_tools import Figures
from benchmarks._scripted_server import MODEL, RequestTruth, Truth

_ROOT = Path(__file__).parents[1]
_PATIENCE_S = 30.0


class ScriptedServer:
    """A running scripted server."""

    def __init__(self, port: int, pid: int) -> None:
        self.url, self.pid, self.model = f"http://127.0.0.1:{port}", pid, MODEL

    def take_truth(self) -> Truth:
        """All that happened since the last call; the next request is number 0 again."""
        with urllib.request.urlopen(f"{self.url}/truth", timeout=_PATIENCE_S) as response:
            return msgspec.json.decode(response.read(), type=Truth)


@contextmanager
def scripted_server(**settings: float) -> Iterator[ScriptedServer]:
    """A server with these flags (`ttft_ms`, `itl_ms`, `jitter`, `tokens_per_chunk`, `seed`)."""
    flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "benchmarks._scripted_server", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_ROOT)
    try:
        assert process.stdout is not None
        yield ScriptedServer(int(process.stdout.readline()), process.pid)
    finally:
        process.kill()
        process.wait()


def true_figures(truth: Truth) -> Figures:
    """What a client without any delay of its own would have seen. Raises SystemExit if a stream did not end well."""
    whole = [request for request in truth.requests if len(request.sent_s) == len(request.due_s)]
    if truth.overrun or len(whole) != len(truth.requests) or not whole:
        raise SystemExit(f"{len(truth.requests) - len(whole)} streams were not read to their end")
    ttft = [request.sent_s[0] - request.arrival_s for request in whole]
    tpot = [_tpot_s(request) for request in whole]
    gaps = token_gaps_s(whole)
    tokens = sum(sum(request.chunk_tokens) for request in whole)
    duration_s = max(request.sent_s[-1] for request in whole) - min(request.arrival_s for request in whole)
    return Figures(
        ttft_mean_ms=float(np.mean(ttft)) * 1e3,
        ttft_p50_ms=float(np.median(ttft)) * 1e3,
        tpot_mean_ms=float(np.mean(tpot)) * 1e3,
        tpot_p50_ms=float(np.median(tpot)) * 1e3,
        itl_mean_ms=float(np.mean(gaps)) * 1e3,
        itl_p50_ms=float(np.median(gaps)) * 1e3,
        e2e_mean_ms=float(np.mean([request.sent_s[-1] - request.arrival_s for request in whole])) * 1e3,
        requests_per_s=len(whole) / duration_s,
        output_tokens_per_s=tokens / duration_s,
        input_tokens_mean=None,  # it has no tokenizer
        requests=len(whole),
        output_tokens=tokens,
    )


def token_gaps_s(requests: Sequence[RequestTruth]) -> list[float]:
    """Gaps between tokens as sent: a chunk of k tokens after a gap g counts k times g / k."""
    return [
        (later - sooner) / tokens
        for request in requests
        for sooner, later, tokens in zip(request.sent_s, request.sent_s[1:], request.chunk_tokens[1:], strict=False)
        for _ in range(tokens)
    ]


def lateness_s(truth: Truth) -> list[float]:
    """How late each chunk was against its timetable, ascending: the server's own error."""
    return sorted(
        sent_s - due_s
        for request in truth.requests
        for sent_s, due_s in zip(request.sent_s, request.due_s, strict=False)
    )


def _tpot_s(request: RequestTruth) -> float:
    return (request.sent_s[-1] - request.sent_s[0]) / max(1, sum(request.chunk_tokens) - 1)
