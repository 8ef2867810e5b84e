"""What one gateway counts, and its Prometheus page: its own requests, and the last report of every worker."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from gateway.core.roster import WorkerState
from gateway.timeline import PARTS
from gateway.worker_metrics import counter_families, worker_families

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_PREFIX = "penstock_gateway_"


class Histogram:
    """Counts per bucket. Cheaper than the client library's, since one thread owns it and one call counts many."""

    __slots__ = ("_counts", "_sum")

    def __init__(self) -> None:
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """Count `times` observations of `seconds` each."""
        self._counts[bisect_left(_SECONDS, seconds)] += times
        self._sum += seconds * times

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Show it as one series of `family`."""
        buckets: list[tuple[str, float]] = []
        total = 0
        for limit, count in zip((*_SECONDS, "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((str(limit), total))
        family.add_metric(labels, buckets, self._sum)


class GatewayMetrics:
    """Totals of one gateway since its start. Owned by the event loop's thread."""

    def __init__(self) -> None:
        self.ttft = Histogram()
        self.itl = Histogram()
        self.e2e = Histogram()
        self.phases = {phase: Histogram() for phase in PARTS}
        self.answers: Counter[tuple[str, int]] = Counter()
        """By (path, HTTP status); 499 is a client that left."""
        self.prompt_tokens_total = 0
        self.cached_tokens_total = 0
        self.generated_tokens_total = 0
        self.clients_left_total = 0
        self.ignored_fields_total = 0
        """Unknown fields of bodies."""
        self.timing_violations_total = 0
        """Durations told by workers that cannot be; see gateway.timeline."""
        self.broken_streams_total = 0
        """Streams that ended with an error after their 200 was sent."""
        self.dropped: dict[str, Callable[[], int]] = {}
        """What was to be told of requests and was not: name -> total so far, asked of its owner."""

    def observe_parts(self, parts_ms: Mapping[str, float]) -> None:
        """Where a request's time went."""
        for part, value_ms in parts_ms.items():
            self.phases[part].observe(value_ms / 1000)

    def families(self) -> Iterator[Metric]:
        """The gateway's own part of the page."""
        for name, text, histogram in (
            ("ttft_seconds", "Arrival of a prompt to its first token.", self.ttft),
            ("itl_seconds", "Time between two tokens of one answer.", self.itl),
            ("e2e_seconds", "Arrival of a request to the end of its answer.", self.e2e),
        ):
            family = HistogramMetricFamily(_PREFIX + name, text)
            histogram.add_to(family, [])
            yield family
        phases = HistogramMetricFamily(
            _PREFIX + "phase_seconds",
            "Parts of the time to the first token, or to a failure; decode_queue and first_step: to the second token.",
            labels=["phase"],
        )
        for phase, histogram in self.phases.items():
            histogram.add_to(phases, [phase])
        yield phases
        answers = CounterMetricFamily(_PREFIX + "requests", "Answered requests.", labels=["path", "status"])
        for (path, status), count in sorted(self.answers.items()):
            answers.add_metric([path, str(status)], count)
        yield answers
        for name, text, value in (
            ("prompt_tokens", "Tokens in prompts.", self.prompt_tokens_total),
            ("cached_tokens", "Prompt tokens that were not computed again.", self.cached_tokens_total),
            ("generated_tokens", "Tokens in answers.", self.generated_tokens_total),
            ("clients_left", "Clients that closed their connection before the end.", self.clients_left_total),
            ("ignored_fields", "Unknown fields of bodies, which were ignored.", self.ignored_fields_total),
            ("broken_streams", "Streams that ended with an error.", self.broken_streams_total),
            ("timing_violations", "Durations told by workers that cannot be.", self.timing_violations_total),
        ):
            yield CounterMetricFamily(_PREFIX + name, text, value=value)
        for name, total in self.dropped.items():
            yield CounterMetricFamily(_PREFIX + name, "Dropped: its reader is too slow or gone.", value=total())


class MetricsPage(Collector):
    """Renders everything in Prometheus' text format."""

    def __init__(
        self,
        metrics: GatewayMetrics,
        gauges: Callable[[], dict[str, float]],
        counters: Callable[[], dict[str, float]],
        workers: Callable[[], Sequence[WorkerState]],
    ) -> None:
        """`gauges`: the gateway's present values by name; `counters`: totals by series; `workers`: everybody it knows."""
        self._metrics, self._gauges, self._counters, self._workers = metrics, gauges, counters, workers
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance: names come with the workers' reports."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Everything, now."""
        yield from self._metrics.families()
        for name, value in self._gauges().items():
            yield GaugeMetricFamily(_PREFIX + name, "Present value.", value=value)
        yield from counter_families(_PREFIX, self._counters())
        yield from worker_families(self._workers())

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)
