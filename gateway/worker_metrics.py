"""The last report of every worker as Prometheus families. What a worker says cannot break the page for the others."""

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from common.messages.liveness import Report
from gateway.core.roster import WorkerState
from gateway.series import parse_key, series

_PREFIX = "penstock_worker_"
_OWN_LABELS = frozenset({"worker", "role", "state"})


def pool_tier(role: str) -> str:
    """Whose memory a process' page counts speak of."""
    return "host" if role == "kvstore" else "device"


def worker_families(workers: Sequence[WorkerState]) -> Iterator[Metric]:
    """Gauges and counters of every worker's last report."""
    up = GaugeMetricFamily(_PREFIX + "up", "1 if the worker takes requests.", labels=["worker", "role"])
    pages = GaugeMetricFamily(_PREFIX + "pages", "KV pages by tier and state.", labels=["worker", "tier", "state"])
    memory = GaugeMetricFamily(
        _PREFIX + "memory_bytes", "Memory by tier and by who has it.", labels=["worker", "tier", "owner"]
    )
    queue = GaugeMetricFamily(_PREFIX + "queue", "Requests and waiting tokens.", labels=["worker", "state"])
    steps = CounterMetricFamily(_PREFIX + "engine_steps", "Engine steps finished.", labels=["worker"])
    unreadable = GaugeMetricFamily(
        _PREFIX + "unreadable_series", "Values of the last report that are no metrics.", labels=["worker"]
    )
    opened = CounterMetricFamily(_PREFIX + "breaker_opened", "Times this gateway passed it over.", labels=["worker"])
    fixed = (up, pages, memory, queue, steps, opened, unreadable)
    reported = _Families({family.name for family in fixed})
    for state in workers:
        name, role = state.member.id, state.member.role
        up.add_metric([name, role], 1.0 if state.condition == "ready" else 0.0)
        opened.add_metric([name], state.breaker_opened_total)
        if state.report is None:
            continue
        for field in state.report.pages.__struct_fields__:
            pages.add_metric([name, pool_tier(role), field], getattr(state.report.pages, field))
        for part in state.report.memory:
            memory.add_metric([name, part.tier, part.owner], part.n_bytes)
        for field in state.report.queue.__struct_fields__:
            queue.add_metric([name, field], getattr(state.report.queue, field))
        steps.add_metric([name], state.report.engine_steps)
        unreadable.add_metric([name], reported.add(name, state.report))
    yield from (*fixed, *reported.sorted())


def counter_families(prefix: str, counters: Mapping[str, float]) -> Iterator[Metric]:
    """Counters given as series, such as `retries_total{kind=replay}`."""
    families: dict[str, Metric] = {}
    for one in series(counters):
        name = prefix + one.name.removesuffix("_total")
        family = families.setdefault(name, Metric(name, "Since the start.", "counter"))
        family.add_sample(f"{name}_total", dict(one.labels), one.value)
    yield from (families[name] for name in sorted(families))


class _Families:
    """Families whose names come with the reports; those in `taken` have another owner."""

    def __init__(self, taken: set[str]) -> None:
        self._taken = taken
        self._families: dict[str, Metric] = {}

    def add(self, worker: str, report: Report) -> int:
        """Add a report's values; returns how many had no place."""
        kinds: tuple[tuple[str, Mapping[str, float]], ...] = (("counter", report.counters), ("gauge", report.gauges))
        return sum(
            not self._add_one(worker, key, value, kind) for kind, values in kinds for key, value in values.items()
        )

    def _add_one(self, worker: str, key: str, value: float, kind: str) -> bool:
        parsed = parse_key(key)
        if parsed is None or _OWN_LABELS & parsed[1].keys():
            return False
        name, labels = _PREFIX + (parsed[0].removesuffix("_total") if kind == "counter" else parsed[0]), parsed[1]
        family = self._families.get(name)
        if name in self._taken or (family is not None and family.type != kind):
            return False
        if family is None:
            family = self._families[name] = Metric(name, "From the worker's report.", kind)
        family.add_sample(name + "_total" * (kind == "counter"), {"worker": worker, **labels}, value)
        return True

    def sorted(self) -> list[Metric]:
        return [self._families[name] for name in sorted(self._families)]
