"""What operators see."""

from pathlib import Path
from unittest.mock import MagicMock

from common.log import Log
from common.net.redis_outage import RedisOutage
from gateway.routes_status import StatusRoutes
from tests.gateway.cluster import Cluster, cluster
from tests.gateway.fake_worker import PATIENCE_S, FakeWorker
from tests.gateway.model import NAME, ids


def test_status_shows_every_worker_with_its_last_report(up: Cluster) -> None:
    with up.http() as client:
        status = client.get("/status").json()
    assert status["gateway"]["open_requests"] == 0
    assert [(worker["id"], worker["role"], worker["state"]) for worker in status["workers"]] == [
        ("decode-0", "decode", "ready"),
        ("prefill-0", "prefill", "ready"),
    ]
    worker = status["workers"][0]
    assert worker["incarnation"] == f"{up.decode.member.incarnation:016x}"
    assert worker["model"]["name"] == NAME
    assert set(worker["pages"]) == {"total", "free", "reserved", "granted", "active", "cached", "quarantined", "lent"}
    assert {"queue", "transports", "alive_ms"} <= set(worker)


def test_metrics_count_requests_tokens_and_workers(up: Cluster) -> None:
    before = samples(up)
    up.answer(ids("abc"))
    up.client().completions.create(model=NAME, prompt="xy")
    with up.http() as client:
        client.get("/nowhere")
    after = samples(up)
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    assert grown['penstock_gateway_requests_total{path="/v1/completions",status="200"}'] == 1
    assert grown['penstock_gateway_requests_total{path="other",status="404"}'] == 1
    assert grown["penstock_gateway_generated_tokens_total"] == 3
    assert grown["penstock_gateway_prompt_tokens_total"] == 2
    assert grown["penstock_gateway_cached_tokens_total"] == 3
    assert grown["penstock_gateway_ttft_seconds_count"] == 1
    assert grown["penstock_gateway_itl_seconds_count"] == 2
    assert after['penstock_worker_up{role="decode",worker="decode-0"}'] == 1


def samples(up: Cluster) -> dict[str, float]:
    """Every series of the page with its value."""
    with up.http() as client:
        lines = client.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_a_reports_pages_and_counters_become_metrics_of_its_worker(up: Cluster) -> None:
    with up.http() as client:
        while "decode-0" not in (page := client.get("/metrics").text).partition("penstock_worker_generated")[2]:
            continue  # the Report is on its way
    assert 'penstock_worker_pages{state="free",tier="device",worker="decode-0"} 90.0' in page
    assert 'penstock_worker_generated_tokens_total{worker="decode-0"} 7.0' in page
    assert 'penstock_worker_hit_tokens_total{tier="host",worker="decode-0"} 64.0' in page
    assert 'penstock_worker_oldest_pin_ms{worker="decode-0"} 12.5' in page


def test_the_status_tells_what_a_worker_caches(up: Cluster) -> None:
    with up.http() as client:
        while not (found := client.get("/status").json()["workers"][0])["reported"]:
            continue  # the Report is on its way
    assert found["tier"] == "device"
    assert found["cache"]["hit_tokens_by_tier"] == {"host": 64}
    assert found["cache"]["oldest_pin_ms"] == 12.5
    assert found["gauges"] == {"oldest_pin_ms": 12.5}


def test_status_and_metrics_tell_who_has_a_workers_memory(up: Cluster) -> None:
    with up.http() as client:
        while not (found := client.get("/status").json()["workers"][0])["reported"]:
            continue  # the Report is on its way
        page = client.get("/metrics").text
    assert found["memory"] == [
        {"owner": "weights", "tier": "device", "bytes": 7000},
        {"owner": "kv_free", "tier": "device", "bytes": 9000},
        {"owner": "parked", "tier": "host", "bytes": 300},
    ]
    assert 'penstock_worker_memory_bytes{owner="kv_free",tier="device",worker="decode-0"} 9000.0' in page
    assert 'penstock_worker_memory_bytes{owner="parked",tier="host",worker="decode-0"} 300.0' in page


def test_the_history_of_memory_has_its_own_page(up: Cluster) -> None:
    with up.http() as client:
        found = client.get("/status/memory").json()
    assert found["every_s"] == 1.0
    assert found["samples"] and set(found["samples"][0]) == {"unix_ms", "workers"}


def test_a_kv_store_is_shown_with_its_tiers(redis_url: str, model: Path) -> None:
    with cluster(redis_url, model) as one:
        store = FakeWorker("kvstore-0", "kvstore", None)
        store.gauges = {"blocks{tier=host}": 5.0, "bytes{tier=disk}": 2.0**20, "cached_blocks": 5.0}
        one.workers.append(store.join(redis_url, one.name))
        assert store.pinged.wait(PATIENCE_S)
        with one.http() as client:
            while not (shown := {w["id"]: w for w in client.get("/status").json()["workers"]}["kvstore-0"])["reported"]:
                continue  # the Report is on its way
            page = client.get("/metrics").text
    assert (shown["role"], shown["tier"], shown["state"]) == ("kvstore", "host", "ready")
    assert shown["cache"]["blocks_by_tier"] == {"host": 5}
    assert shown["cache"]["bytes_by_tier"] == {"disk": 2**20}
    assert 'penstock_worker_blocks{tier="host",worker="kvstore-0"} 5.0' in page
    assert 'penstock_worker_pages{state="free",tier="host",worker="kvstore-0"} 90.0' in page


def test_status_tells_for_how_long_redis_has_not_answered_which_part_and_why() -> None:
    log, outages = Log(), {}
    for part in ("membership", "prompt_tree"):
        outages[part] = RedisOutage(log, "redis://h/0", part, lambda: 7.0)
    members, tree = (MagicMock(outage=outages[part]) for part in ("membership", "prompt_tree"))
    routes = StatusRoutes(MagicMock(), MagicMock(), tree, MagicMock(), MagicMock(), members)
    nothing = {"membership_lost_s": None, "membership_error": "", "prompt_tree_lost_s": None, "prompt_tree_error": ""}
    assert routes._redis() == {"address": "redis://h/0", **nothing}
    for part, outage in outages.items():
        outage.failed("TimeoutError: late")
        told = {f"{part}_lost_s": 0.0, f"{part}_error": "TimeoutError: late"}
        assert routes._redis() == {"address": "redis://h/0", **nothing, **told}
        outage.answered()
