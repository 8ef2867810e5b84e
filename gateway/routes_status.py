"""What operators ask: alive, ready, metrics, state."""

import time
from collections.abc import Callable
from typing import Any  # Any: JSON

import msgspec
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from common.errors import NoWorker
from common.messages.liveness import Member, PageCounts, QueueCounts
from common.net.redis import Membership
from gateway.cache_fields import cache_fields
from gateway.core.lost_workers import LostWorker
from gateway.core.roster import WorkerState
from gateway.errors import error_response
from gateway.memory_history import MemoryHistory, memory_fields
from gateway.metrics import GatewayMetrics, MetricsPage
from gateway.switchboard import Switchboard
from gateway.tree_keeper import TreeKeeper
from gateway.worker_metrics import pool_tier


class StatusRoutes:
    """Reads; owns nothing."""

    def __init__(
        self,
        this: Member,
        switchboard: Switchboard,
        tree: TreeKeeper,
        metrics: GatewayMetrics,
        memory: MemoryHistory,
        membership: Membership,
    ) -> None:
        """`this`: the gateway's own membership record."""
        self._membership = membership
        self._this, self._switchboard, self._tree, self._memory = this, switchboard, tree, memory
        self._page = MetricsPage(metrics, self._gauges, self._counters, switchboard.workers)

    def _gauges(self) -> dict[str, float]:
        return {
            "open_requests": self._switchboard.open_requests,
            "waiting_requests": self._switchboard.waiting_requests,
            "repeated_tokens": self._switchboard.repeated_tokens_total,
            "ready": float(self._switchboard.not_ready_reason() is None),
            **self._switchboard.gauges(),
            **self._tree.gauges(),
            "membership_connected": float(self._membership.outage.lost_s is None),
        }

    def _counters(self) -> dict[str, float]:
        failures = {"membership_failures_total": float(self._membership.failures_total)}
        return {**self._switchboard.counters(), **self._tree.counters(), **failures}

    def add_to(self, app: FastAPI) -> None:
        """Register the endpoints."""
        routes: dict[str, Callable[[Request], Any]] = {
            "/health": self.health,
            "/ready": self.ready,
            "/metrics": self.metrics,
            "/status": self.status,
            "/status/memory": self.memory,
        }
        for path, endpoint in routes.items():
            app.add_api_route(path, endpoint, methods=["GET", "HEAD"])

    async def health(self, request: Request) -> Response:
        """200 while the process lives."""
        return _json({"status": "alive"})

    async def ready(self, request: Request) -> Response:
        """200 when a request would be served now, else 503 with what is missing."""
        reason = self._switchboard.not_ready_reason()
        if reason is None and not self._tree.settled:
            reason = "the prompt tree is not loaded yet"
        return _json({"status": "ready"}) if reason is None else error_response(NoWorker(f"not ready: {reason}"))

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text format."""
        return Response(self._page.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def status(self, request: Request) -> Response:
        """Everything this gateway knows of itself and of the workers."""
        gateway = {
            "id": self._this.id,
            "incarnation": f"{self._this.incarnation:016x}",
            "endpoint": self._this.endpoint,
            "host": self._this.host,
            "pid": self._this.pid,
            "pid_space": self._this.pid_space,
            "unix_ms": time.time_ns() // 1_000_000,
            "versions": self._this.versions,
            "policies": self._this.policies,
            "open_requests": self._switchboard.open_requests,
            "waiting_requests": self._switchboard.waiting_requests,
            "routing": self._switchboard.counters(),
            "prompt_tree": {**self._tree.gauges(), **self._tree.counters()},
            "redis": self._redis(),
            "ready": self._switchboard.not_ready_reason() is None,
        }
        workers = [_worker_fields(state) for state in self._switchboard.workers()]
        lost = [_lost_fields(one, ago_ms) for one, ago_ms in self._switchboard.lost()]
        return _json({"gateway": gateway, "workers": workers, "lost": lost})

    def _redis(self) -> dict[str, Any]:
        """Where it is, for how long it has not answered whom (null while it does), and what came instead."""
        found: dict[str, Any] = {"address": self._membership.outage.address}
        for part, outage in (("membership", self._membership.outage), ("prompt_tree", self._tree.outage)):
            lost_s = outage.lost_s
            found[f"{part}_lost_s"] = None if lost_s is None else round(lost_s, 1)
            found[f"{part}_error"] = "" if lost_s is None else outage.why
        return found

    async def memory(self, request: Request) -> Response:
        """Who had which memory over the last 10 minutes."""
        return Response(self._memory.page(), media_type="application/json")


def _worker_fields(state: WorkerState) -> dict[str, Any]:
    report = state.report
    return {
        "id": state.member.id,
        "role": state.member.role,
        "incarnation": f"{state.member.incarnation:016x}",
        "state": state.condition,
        "reason": state.text,
        "model": None if state.member.model is None else msgspec.to_builtins(state.member.model),
        "endpoint": state.member.endpoint,
        "pid": state.member.pid,
        "pid_space": state.member.pid_space,
        "host": state.member.host,
        "share_kind": state.member.share_kind if state.member.share_path is not None else "",
        "device_uuid": state.member.device_uuid,
        "joined_unix_ms": state.member.joined_unix_ms,
        "versions": state.member.versions,
        "policies": state.member.policies,
        "degraded": "" if report is None else report.degraded,
        "pages": msgspec.to_builtins(PageCounts() if report is None else report.pages),
        "tier": pool_tier(state.member.role),
        "memory": memory_fields(report),
        "cache": cache_fields(report),
        "queue": msgspec.to_builtins(QueueCounts() if report is None else report.queue),
        "transports": [] if report is None else msgspec.to_builtins(report.transports),
        "engine_steps": 0 if report is None else report.engine_steps,
        "counters": {} if report is None else report.counters,
        "gauges": {} if report is None else report.gauges,
        "draining": report is not None and report.draining,
        "charged_requests": state.charged_requests,
        "breaker": state.breaker.value,
        "cost": None if report is None or report.cost is None else msgspec.structs.asdict(report.cost),
        "alive_ms": round(state.alive_ms),
        "reported": report is not None,
    }


def _lost_fields(one: LostWorker, ago_ms: float) -> dict[str, Any]:
    member = one.member
    return {
        "id": member.id,
        "role": member.role,
        "reason": one.text,
        "ago_ms": round(ago_ms),
        "host": member.host,
        "pid": member.pid,
        "pid_space": member.pid_space,
    }


def _json(fields: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(fields), media_type="application/json")
