"""Builds the gateway's pure half from its settings: who knows workers, who routes, who limits."""

from random import Random

from common.messages.liveness import Member
from common.policy.routing import Router
from gateway.core.breaker import BreakerTerms
from gateway.core.dispatch import Dispatch
from gateway.core.inflight import Parts
from gateway.core.keys import KeyLimits, KeyTerms
from gateway.core.placement import Placement, Tree
from gateway.core.recovery import RetryTerms
from gateway.core.roster import Fit, Roster
from gateway.core.terms import Terms
from gateway.core.totals import RoutingTotals
from gateway.settings import GatewaySettings


def build_dispatch(
    settings: GatewaySettings, this: Member, fit: Fit, tree: Tree, keys: dict[str, KeyTerms], seed: int
) -> Dispatch:
    """`seed`: of the jitter of retries, another in every gateway."""
    breaker = BreakerTerms(failures=settings.breaker_failures, open_ms=settings.breaker_open_s * 1000)
    fallback = settings.prefill_fallback == "allow"
    roster = Roster(this=this, silent_ms=settings.silent_worker_ms, fit=fit, breaker=breaker, fallback=fallback)
    router = Router(
        prefill=settings.route_prefill,
        decode=settings.route_decode,
        gate=settings.route_gate,
        local_prefill_tokens=settings.local_prefill_tokens,
        fallback=fallback,
        peer_fetch=settings.peer_fetch == "auto",
    )
    totals = RoutingTotals()
    parts = Parts(
        roster=roster,
        placement=Placement(roster, router, tree, totals),
        keys=KeyLimits(keys),
        totals=totals,
        draw=Random(seed).random,
    )
    terms = Terms(
        timeout_ms=settings.request_timeout_s * 1000,
        max_open=settings.max_inflight,
        max_waiting=settings.max_waiting,
        max_wait_ms=settings.max_wait_s * 1000,
        retry=RetryTerms(attempts=settings.attempts, wait_ms=settings.retry_wait_s * 1000),
    )
    return Dispatch(parts, terms, fallback=fallback)
