"""Pages of scripted servers."""

import json
from typing import Any


def worker(name: str, role: str, **changes: Any) -> dict[str, Any]:
    """A worker's entry in /status: 100 pages, nothing held."""
    pages = {"total": 100, "free": 100, "reserved": 0, "granted": 0, "active": 0, "cached": 0, "quarantined": 0}
    queue = {"waiting": 0, "running": 0, "handing_over": 0, "waiting_tokens": 0, "work_ms": 0.0, "kv_tokens": 0}
    return {
        "id": name,
        "role": role,
        "state": "ready",
        "pages": {**pages, **changes.pop("pages", {})},
        "queue": {**queue, **changes.pop("queue", {})},
        "gauges": {},
        "charged_requests": 0,
        **changes,
    }


def status(*workers: dict[str, Any], open_requests: int = 0, waiting_requests: int = 0) -> bytes:
    """A whole /status."""
    gateway = {"id": "gateway-0", "open_requests": open_requests, "waiting_requests": waiting_requests, "ready": True}
    return json.dumps({"gateway": gateway, "workers": workers}).encode()


def vllm(running: int, waiting: int, kv_used: float) -> bytes:
    """The part of vLLM's /metrics that counts, between lines that do not."""
    return f"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="m"}} {running}.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{engine="0",model_name="m"}} {waiting}.0
vllm:num_requests_waiting_by_reason{{engine="0",model_name="m",reason="capacity"}} 77.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} {kv_used}
vllm:time_to_first_token_seconds_bucket{{engine="0",le="0.001",model_name="m"}} 0.0
python_gc_objects_collected_total{{generation="0"}} 9876.0
""".encode()
