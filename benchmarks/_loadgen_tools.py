"""The load generators that are compared: how each is asked for a run, and where its answer says what.

Peers are programs in virtual environments of their own; each gets the same load and prompts of its own making.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any  # Any: other programs' JSON

_ROOT = Path(__file__).parents[1]
_PATIENCE_S = 300.0
PENSTOCK_CODES = (0, 3)
"""3: it found itself late; whether it was is for us to see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a load generator, or a server, reports of a run, by our definitions; None: it does not report that."""

    ttft_mean_ms: float | None
    ttft_p50_ms: float | None
    tpot_mean_ms: float | None
    """One figure a request, its first token left out."""
    tpot_p50_ms: float | None
    itl_mean_ms: float | None
    """All gaps of all requests."""
    itl_p50_ms: float | None
    e2e_mean_ms: float | None
    requests_per_s: float | None
    output_tokens_per_s: float | None
    input_tokens_mean: float | None
    """Of a prompt, as the server counted."""
    requests: int
    output_tokens: int

    @classmethod
    def names(cls) -> list[str]:
        """Of the figures, in the order of printing."""
        return [field.name for field in fields(cls)]


@dataclass(frozen=True, slots=True)
class Load:
    """A closed loop of `concurrency`, or an open loop of `rate_per_s` at constant gaps."""

    concurrency: int | None
    rate_per_s: float | None
    requests: int
    input_tokens: int
    output_tokens: int
    endpoint: str
    """completions or chat."""

    def __str__(self) -> str:
        how = f"closed loop of {self.concurrency}" if self.concurrency else f"open loop, {self.rate_per_s:g}/s constant"
        return f"{how}, {self.requests} requests of {self.input_tokens} + {self.output_tokens} tokens, {self.endpoint}"


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to ask."""

    url: str
    model: str
    tokenizer: Path
    """Folder with the tokenizer for tools that make prompts of text."""


@dataclass(frozen=True, slots=True)
class Tool:
    """One load generator."""

    name: str
    version: str
    command: Callable[[Load, Target, Path], list[str]]
    """The command line that leaves its result in a folder."""
    read: Callable[[Path], Figures]
    good_codes: tuple[int, ...] = (0,)

    def run(self, load: Load, target: Target, folder: Path) -> tuple[Figures, float]:
        """One run: what it found, and the CPU seconds it took with its start. Raises SystemExit if it failed."""
        folder.mkdir(parents=True)
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            self.command(load, target, folder),
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            cwd=_ROOT,
            env=environment,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode not in self.good_codes:
            raise SystemExit(f"{self.name} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
        return self.read(folder), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def penstock() -> Tool:
    """This repository's."""
    return Tool("penstock", "of this tree", penstock_command, _read_penstock, PENSTOCK_CODES)


def penstock_by_text() -> Tool:
    """The same without asking for token ids: it sees what its peers see."""
    command = _with_more(penstock_command, "--no-return-token-ids")
    return Tool("by text", "is penstock without token ids", command, _read_penstock, PENSTOCK_CODES)


def _with_more(
    command: Callable[[Load, Target, Path], list[str]], *more: str
) -> Callable[[Load, Target, Path], list[str]]:
    return lambda load, target, folder: [*command(load, target, folder), *more]


def guidellm(program: Path) -> Tool:
    """GuideLLM's `guidellm`."""
    command = _with_program(program, _guidellm_arguments)
    return Tool("guidellm", _version(program, "guidellm"), command, _read_guidellm)


def aiperf(program: Path) -> Tool:
    """NVIDIA's `aiperf`."""
    return Tool("aiperf", _version(program, "aiperf"), _with_program(program, _aiperf_arguments), _read_aiperf)


def _with_program(
    program: Path, arguments: Callable[[Load, Target, Path], list[str]]
) -> Callable[[Load, Target, Path], list[str]]:
    return lambda load, target, folder: [str(program), *arguments(load, target, folder)]


def _version(program: Path, package: str) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    asked = subprocess.run([program.parent / "python", "-c", code], capture_output=True, text=True)
    return asked.stdout.strip() or "unknown"


def penstock_command(load: Load, target: Target, folder: Path) -> list[str]:
    """Its command line; what it leaves is read by `penstock_result`, or by `loadgen.output.files.load`."""
    how = ["--concurrency", str(load.concurrency)] if load.concurrency else ["--rate", str(load.rate_per_s)]
    arrival = [] if load.concurrency else ["--arrival", "constant"]
    shape = ["--num-requests", str(load.requests), "--isl", str(load.input_tokens), "--osl", str(load.output_tokens)]
    where = ["--url", target.url, "--model", target.model, "--endpoint", load.endpoint]
    out = ["--out", str(folder), "--no-html", "--quiet"]
    return [sys.executable, "-m", "loadgen", "run", *where, *how, *arrival, *shape, *out]


def penstock_result(folder: Path) -> dict[str, Any]:
    """The summary that a run left."""
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def _read_penstock(folder: Path) -> Figures:
    found = penstock_result(folder)
    return Figures(
        ttft_mean_ms=found["mean_ttft_ms"],
        ttft_p50_ms=found["median_ttft_ms"],
        tpot_mean_ms=found["mean_tpot_ms"],
        tpot_p50_ms=found["median_tpot_ms"],
        itl_mean_ms=found["mean_itl_ms"],
        itl_p50_ms=found["median_itl_ms"],
        e2e_mean_ms=found["mean_e2el_ms"],
        requests_per_s=found["request_throughput"],
        output_tokens_per_s=found["output_throughput"],
        input_tokens_mean=found["total_input_tokens"] / max(1, found["completed"]),
        requests=found["completed"],
        output_tokens=found["total_output_tokens"],
    )


def _guidellm_arguments(load: Load, target: Target, folder: Path) -> list[str]:
    path = "/v1/chat/completions" if load.endpoint == "chat" else "/v1/completions"
    profile = (
        f"kind=concurrent,streams={load.concurrency}" if load.concurrency else f"kind=constant,rate={load.rate_per_s}"
    )
    return [
        "run",
        *("--backend", f"kind=openai_http,target={target.url},model={target.model},request_format={path}"),
        *("--profile", profile),
        *("--constraint", f"kind=max_requests,count={load.requests}"),
        *("--tokenizer", f"kind=huggingface_auto,model={target.tokenizer}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={load.input_tokens},output_tokens={load.output_tokens}"),
        *("--output", f"kind=json,path={folder / 'result.json'}"),
        "--disable-console",
    ]


def _read_guidellm(folder: Path) -> Figures:
    """Its inter-token latency is one figure a request without the first token: our TPOT. Gaps it does not report."""
    metrics = json.loads((folder / "result.json").read_text())["benchmarks"][0]["metrics"]

    def of(name: str, what: str) -> float:
        return float(metrics[name]["successful"][what])

    requests = int(metrics["request_totals"]["successful"])
    return Figures(
        ttft_mean_ms=of("time_to_first_token_ms", "mean"),
        ttft_p50_ms=of("time_to_first_token_ms", "median"),
        tpot_mean_ms=of("inter_token_latency_ms", "mean"),
        tpot_p50_ms=of("inter_token_latency_ms", "median"),
        itl_mean_ms=None,
        itl_p50_ms=None,
        e2e_mean_ms=of("request_latency", "mean") * 1e3,
        requests_per_s=of("requests_per_second", "mean"),
        output_tokens_per_s=of("output_tokens_per_second", "mean"),
        input_tokens_mean=of("prompt_token_count", "mean"),
        requests=requests,
        output_tokens=round(of("output_token_count", "total_sum")),
    )


def _aiperf_arguments(load: Load, target: Target, folder: Path) -> list[str]:
    rate = ["--request-rate", str(load.rate_per_s), "--request-rate-mode", "constant"]
    return [
        "profile",
        *("-m", target.model, "-u", target.url, "--streaming"),
        *("--endpoint-type", "chat" if load.endpoint == "chat" else "completions"),
        *("--tokenizer", str(target.tokenizer), "--use-server-token-count"),
        *(["--concurrency", str(load.concurrency)] if load.concurrency else rate),
        *("--request-count", str(load.requests)),
        *("--isl", str(load.input_tokens), "--isl-stddev", "0", "--osl", str(load.output_tokens), "--osl-stddev", "0"),
        *("--extra-inputs", "ignore_eos:true"),
        *("--artifact-dir", str(folder), "--ui", "none"),
    ]


def _read_aiperf(folder: Path) -> Figures:
    """Its inter-token latency is one figure a request without the first token: our TPOT. Our ITL is its chunk latency."""
    found: Mapping[str, Any] = json.loads((folder / "profile_export_aiperf.json").read_text())
    return Figures(
        ttft_mean_ms=found["time_to_first_token"]["avg"],
        ttft_p50_ms=found["time_to_first_token"]["p50"],
        tpot_mean_ms=found["inter_token_latency"]["avg"],
        tpot_p50_ms=found["inter_token_latency"]["p50"],
        itl_mean_ms=found["inter_chunk_latency"]["avg"],
        itl_p50_ms=found["inter_chunk_latency"]["p50"],
        e2e_mean_ms=found["request_latency"]["avg"],
        requests_per_s=found["request_throughput"]["avg"],
        output_tokens_per_s=found["output_token_throughput"]["avg"],
        input_tokens_mean=found["input_sequence_length"]["avg"],
        requests=round(found["request_count"]["avg"]),
        output_tokens=round(found["total_osl"]["avg"]),
    )
