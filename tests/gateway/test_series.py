"""Keys with labels, and the families and fields made of them."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.registry import Collector

from common.ids import Incarnation, WorkerId
from common.messages.liveness import Member, PageCounts, QueueCounts, Report
from gateway.cache_fields import cache_fields
from gateway.core.roster import WorkerState
from gateway.series import by_label, parse_key
from gateway.worker_metrics import worker_families


def report(counters: dict[str, float], gauges: dict[str, float], name: str = "w") -> Report:
    return Report(
        worker=WorkerId(name),
        role="mixed",
        incarnation=Incarnation(1),
        sequence=1,
        pages=PageCounts(total=4, free=4),
        queue=QueueCounts(),
        counters=counters,
        gauges=gauges,
    )


def page(*states: WorkerState) -> list[str]:
    """The lines of the workers' part of /metrics."""

    class Workers(Collector):
        def collect(self):  # type: ignore[no-untyped-def]
            return worker_families(states)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Workers())
    return generate_latest(registry).decode().splitlines()


def state(one: Report, role: str = "mixed") -> WorkerState:
    member = Member(id=one.worker, role=role, incarnation=one.incarnation, endpoint="", host="", pid=1)
    return WorkerState(member, "ready", "", 0.0, one, 0)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("steps_total", ("steps_total", {})),
        ("hit_tokens_total{tier=host}", ("hit_tokens_total", {"tier": "host"})),
        ("x{a=1,b=two words}", ("x", {"a": "1", "b": "two words"})),
        ("x{}", None),
        ("x{a=1", None),
        ("x{a=1,a=2}", None),
        ("x{a}", None),
        ("9x", None),
        ("x y", None),
        ("", None),
        ("x\n", None),
    ],
)
def test_a_key_is_a_name_with_labels_or_nothing(key: str, expected: object) -> None:
    assert parse_key(key) == expected


def test_values_are_grouped_by_one_label() -> None:
    values = {"hit{tier=host}": 1.0, "hit{tier=disk}": 2.0, "hit": 3.0, "other{tier=host}": 4.0}
    assert by_label(values, "hit", "tier") == {"host": 1.0, "disk": 2.0}


def test_labels_of_a_report_become_labels_of_its_family() -> None:
    one = report(
        {"hit_tokens_total{tier=host}": 5.0, "hit_tokens_total{tier=device}": 7.0, "missed_tokens_total": 1.0},
        {"oldest_pin_ms": 2.5, "blocks{tier=disk}": 9.0},
    )
    lines = page(state(one), state(report({"hit_tokens_total{tier=host}": 6.0}, {}, "v")))
    assert 'penstock_worker_hit_tokens_total{tier="host",worker="w"} 5.0' in lines
    assert 'penstock_worker_hit_tokens_total{tier="device",worker="w"} 7.0' in lines
    assert 'penstock_worker_hit_tokens_total{tier="host",worker="v"} 6.0' in lines
    assert 'penstock_worker_missed_tokens_total{worker="w"} 1.0' in lines
    assert 'penstock_worker_oldest_pin_ms{worker="w"} 2.5' in lines
    assert 'penstock_worker_blocks{tier="disk",worker="w"} 9.0' in lines
    assert lines.count("# TYPE penstock_worker_hit_tokens_total counter") == 1
    assert "# TYPE penstock_worker_blocks gauge" in lines


def test_pages_of_a_kv_store_are_host_memory() -> None:
    lines = page(state(report({}, {}), "kvstore"), state(report({}, {}, "v")))
    assert 'penstock_worker_pages{state="free",tier="host",worker="w"} 4.0' in lines
    assert 'penstock_worker_pages{state="free",tier="device",worker="v"} 4.0' in lines


@pytest.mark.parametrize(
    ("counters", "gauges"),
    [
        ({"no metric!": 1.0}, {}),
        ({"x{worker=other}": 1.0}, {}),
        ({}, {"pages{tier=host}": 1.0}),
        ({"depth_total": 1.0}, {"depth": 1.0}),
    ],
)
def test_what_is_no_metric_is_counted_and_hides_nobody_else(
    counters: dict[str, float], gauges: dict[str, float]
) -> None:
    lines = page(state(report(counters, gauges)), state(report({"steps_total": 3.0}, {}, "v")))
    assert 'penstock_worker_unreadable_series{worker="w"} 1.0' in lines
    assert 'penstock_worker_unreadable_series{worker="v"} 0.0' in lines
    assert 'penstock_worker_steps_total{worker="v"} 3.0' in lines


def test_the_cache_of_a_process_has_the_same_fields_whatever_it_reported() -> None:
    one = report(
        {
            "hit_tokens_total{tier=peer}": 32.0,
            "missed_tokens_total": 16.0,
            "kv_bytes_total{direction=host_to_device}": 8.0,
        },
        {"cached_blocks": 3.0, "oldest_pin_ms": 1.5, "blocks{tier=host}": 2.0, "bytes{tier=host}": 64.0},
    )
    found = cache_fields(one)
    assert (found["cached_blocks"], found["oldest_pin_ms"], found["missed_tokens"]) == (3, 1.5, 16)
    assert (found["blocks_by_tier"], found["bytes_by_tier"]) == ({"host": 2}, {"host": 64})
    assert (found["hit_tokens_by_tier"], found["moved_bytes_by_direction"]) == ({"peer": 32}, {"host_to_device": 8})
    assert cache_fields(None).keys() == found.keys()
