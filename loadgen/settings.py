"""Settings of a measured run, as data: what flags become. `loadgen.flags` reads them, `shown` writes them down."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any  # Any: JSON

from common.errors import ConfigError
from loadgen.results.metrics import PERCENTILES, Slo
from loadgen.schedule.curves import ExponentialRamp, LinearRamp, Pattern, Steady
from loadgen.schedule.load import Load
from loadgen.stats.assertions import Assertion
from loadgen.traces.change import Change
from loadgen.traces.files import TraceFile
from loadgen.workload.mix_text import MixedPart
from loadgen.workload.options import Options


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSettings:
    """What is sent, checked and complete."""

    dataset: str
    shape: str | None
    options: Options
    """Of a made-up dataset, with its defaults."""
    mix: tuple[MixedPart, ...]
    file: TraceFile | None
    change: Change
    """Of a trace: all of it; of a made-up dataset: the scales."""
    cancel_rate: float
    token_ids_from: tuple[int, int]
    content: str
    """`ids` or `words`: what made-up prompts are of."""

    def shown(self) -> dict[str, object]:
        """Every setting that takes part, as JSON and as it would be typed."""
        shown: dict[str, object] = {"dataset": self.dataset, "cancel_rate": self.cancel_rate, "content": self.content}
        if self.shape is not None:
            shown["shape"] = self.shape
        shown |= {name: _json(value) for name, value in self.options.given().items()}
        if self.mix:
            shown["mix"] = ",".join(map(str, self.mix))
        change = self.change
        shown |= {"scale_isl": change.scale_isl, "scale_osl": change.scale_osl}
        if self.file is not None:
            shown |= {"dataset_path": self.file.path, "block": self.file.block_tokens, "tokenizer": self.file.tokenizer}
            shown |= {"trace_speed": change.speed, "trace_start": change.start_s, "trace_end": change.end_s}
        if self.content == "ids":
            shown["token_ids_from"] = "{}-{}".format(*self.token_ids_from)
        return shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Whom to ask, and how."""

    url: str | None
    """None: a cluster of our own."""
    cluster: str | None = None
    cluster_flags: tuple[str, ...] = ()
    baseline: bool = False
    model: str | None = None
    endpoint: str = "completions"
    api_key: str | None = field(default=None, repr=False)
    header: Mapping[str, str] = field(default_factory=dict, repr=False)
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    ignore_eos: bool = True
    return_token_ids: bool = True
    session_ids: bool = False
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other. Raises ConfigError."""
        if self.url is not None and self.cluster is not None:
            raise ConfigError("give --url (a server that runs) or --cluster (one started for this run), not both")
        if self.cluster is None and self.baseline:
            raise ConfigError("--baseline needs --cluster: it measures as many mixed workers on the same work")
        if self.cluster is None and self.cluster_flags:
            raise ConfigError("--cluster-flags needs --cluster")


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What is judged, written and shown."""

    goodput: Slo | None = None
    percentiles: tuple[float, ...] = PERCENTILES
    assertions: tuple[Assertion, ...] = ()
    out: Path | None = None
    html: bool = True
    csv: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    watch: bool = True
    leak_check: bool = True
    leak_wait_s: float = 10.0
    """How long the server may take to give everything back."""
    quiet: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """Everything one measured run needs."""

    target: Target
    load: Load
    workload: WorkloadSettings
    output: Output
    seed: int | None = None
    warmup: int | float = 0
    """Requests before the run (int), or its first seconds that do not count (float)."""
    cooldown_s: float = 0.0
    workers: int = 1


def shown(settings: RunSettings) -> dict[str, Any]:
    """Every setting by the name of its flag, as JSON; keys and headers' values, which may be secrets, are left out."""
    target, load, output = settings.target, settings.load, settings.output
    found: dict[str, Any] = {
        "url": target.url,
        "cluster": target.cluster,
        "cluster_flags": " ".join(target.cluster_flags),
        "model": target.model,
        "endpoint": target.endpoint,
        "header": sorted(target.header),
        "extra_body": dict(target.extra_body),
        "no_ignore_eos": not target.ignore_eos,
        "no_return_token_ids": not target.return_token_ids,
        "session_ids": target.session_ids,
        "timeout": target.timeout_s,
        **_shown_load(load),
        "warmup": f"{settings.warmup:g}s" if isinstance(settings.warmup, float) else settings.warmup,
        "cooldown": settings.cooldown_s,
        "workers": settings.workers,
        "seed": settings.seed,
        **settings.workload.shown(),
        "goodput": output.goodput
        and {"ttft_s": output.goodput.ttft_s, "tpot_s": output.goodput.tpot_s, "e2e_s": output.goodput.e2e_s},
        "label": dict(output.labels),
    }
    return {name: value for name, value in found.items() if value not in (None, "", [], {}, False)}


def _shown_load(load: Load) -> dict[str, Any]:
    curve = load.curve
    rhythm: dict[str, Any] = {"concurrency": load.concurrency, "replay": load.replay}
    match curve:
        case Steady(per_s):
            rhythm = {"rate": per_s}
        case LinearRamp(low, high, over_s):
            rhythm = {"ramp": f"linear:{low:g}-{high:g}:{over_s:g}"}
        case ExponentialRamp(low, high, over_s):
            rhythm = {"ramp": f"exponential:{low:g}-{high:g}:{over_s:g}"}
        case Pattern(pieces):
            rhythm = {"rate_pattern": ",".join(f"{rate:g}:{length_s:g}" for rate, length_s in pieces)}
    open_loop = {"arrival": load.arrival, "burstiness": load.burstiness, "turns_by": load.turns_by}
    live = {"live": load.live} if load.turns_by == "arrivals" else {}
    limits = {"max_concurrency": load.max_concurrency, "num_requests": load.n_requests, "duration": load.duration_s}
    return {**rhythm, **(open_loop if curve is not None else {}), **live, **limits}


def _json(value: object) -> object:
    return value if isinstance(value, int | float) else str(value)
