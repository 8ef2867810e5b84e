"""Prometheus' text format, as other LLM servers write it on `/metrics`. Pure.

Names: vLLM https://docs.vllm.ai/en/stable/usage/metrics, SGLang https://docs.sglang.io/references/production_metrics.html,
text-generation-inference https://huggingface.co/docs/text-generation-inference/reference/metrics, and llama.cpp's
`llama-server --metrics`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from loadgen.results.timeline import ServerSample

_LARGEST = 2.0**53
_SAME_ACROSS = {"tp_rank", "pp_rank", "moe_ep_rank", "priority"}
"""Labels whose values do not stand for requests of their own: ranks repeat a number, priorities split it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrometheusMetrics:
    """A Source: the words of one kind of server."""

    server: str
    path: str = "/metrics"
    prefix: str
    """What its metrics begin with."""
    running: str
    waiting: str
    kv_used: tuple[str, ...] = ()
    """Share of KV memory in use, 0 to 1, by the names that versions had for it; the first that is there counts."""

    def speaks(self, body: bytes) -> bool:
        """Whether the page is of this kind of server. Some gauges show up with the first request only."""
        return any(line.startswith(self.prefix.encode()) for line in body.splitlines())

    def sample(self, body: bytes, at_s: float) -> ServerSample:
        """The server at that moment; several engines behind one page are added up, their KV shares averaged."""
        found = _values(body, (self.running, self.waiting, *self.kv_used))
        shares = next((found[name] for name in self.kv_used if found[name]), [])
        return ServerSample(
            at_s=at_s,
            waiting=round(sum(found[self.waiting])),
            running=round(sum(found[self.running])),
            kv_used=sum(shares) / len(shares) if shares else None,
        )

    def held(self, body: bytes) -> dict[str, float]:
        """Requests alone: whether KV in use includes what is kept for reuse differs between servers and versions."""
        sample = self.sample(body, 0.0)
        return {"running requests": sample.running, "waiting requests": sample.waiting}

    def document(self, body: bytes) -> Mapping[str, object] | None:
        """Not kept: hundreds of counters since the server's start."""
        return None


OTHER_SERVERS = (
    PrometheusMetrics(
        server="vLLM",
        prefix="vllm:",
        running="vllm:num_requests_running",
        waiting="vllm:num_requests_waiting",
        kv_used=("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    ),
    PrometheusMetrics(
        server="SGLang",
        prefix="sglang:",
        running="sglang:num_running_reqs",
        waiting="sglang:num_queue_reqs",
        kv_used=("sglang:token_usage",),
    ),
    PrometheusMetrics(
        server="llama.cpp",
        prefix="llamacpp:",
        running="llamacpp:requests_processing",
        waiting="llamacpp:requests_deferred",
        kv_used=("llamacpp:kv_cache_usage_ratio",),
    ),
    PrometheusMetrics(
        server="text-generation-inference",
        prefix="tgi_",
        running="tgi_batch_current_size",
        waiting="tgi_queue_size",
    ),
)


def _values(body: bytes, names: tuple[str, ...]) -> dict[str, list[float]]:
    """Name -> one value per engine. Lines of other metrics, some thousands of them, are never parsed.

    A value that is no finite number of sane size counts as not told.
    """
    wanted = tuple(f"{name}{after}".encode() for name in names for after in ("{", " "))
    text = b"\n".join(line for line in body.splitlines() if line.startswith(wanted)).decode(errors="replace")
    by_engine: dict[str, dict[tuple[tuple[str, str], ...], float]] = {name: {} for name in names}
    for one in _samples(text):
        if one.name in by_engine and abs(one.value) <= _LARGEST:  # false for NaN
            engine = tuple(sorted(pair for pair in one.labels.items() if pair[0] not in _SAME_ACROSS))
            engines = by_engine[one.name]
            engines[engine] = max(one.value, engines.get(engine, one.value))
    return {name: list(values.values()) for name, values in by_engine.items()}


def _samples(text: str) -> list[Sample]:
    try:
        return [one for family in text_string_to_metric_families(text + "\n") for one in family.samples]
    except LookupError as error:  # the parser's own way to say that a line is cut
        raise ValueError(f"/metrics: not Prometheus' format: {error}") from error
