"""What operators see."""

from tests.gateway.cluster import Cluster
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
    assert set(worker["pages"]) == {"total", "free", "reserved", "granted", "active", "cached", "quarantined"}
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
    assert 'penstock_worker_pages{state="free",worker="decode-0"} 90.0' in page
    assert 'penstock_worker_generated_tokens_total{worker="decode-0"} 7.0' in page
