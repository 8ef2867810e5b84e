"""How a request was routed, as response headers, for clients that ask with `x-penstock-explain: 1`."""

from collections.abc import Sequence
from typing import Any  # Any: JSON

import msgspec

from common.policy.estimates import Estimate
from common.policy.routing_rules import Choice
from gateway.core.actions import Routed

HEADER = b"x-penstock-explain"
_MOST_PROMPTS = 4
_MOST_CANDIDATES = 8  # a header must stay small; the chosen one and the fastest others


def explain_headers(routes: Sequence[Routed]) -> list[tuple[bytes, bytes]]:
    """One header per prompt, in order, for the first few: JSON on one line, the latest attempt's decision and its numbers."""
    return [(HEADER, msgspec.json.encode(route_fields(one))) for one in routes[:_MOST_PROMPTS]]


def route_fields(routed: Routed) -> dict[str, Any]:
    """The decision, times in milliseconds."""
    placed, route = routed.placed, routed.placed.route
    estimate = route.estimate
    fetch = None if estimate is None else estimate.fetch
    return {
        "attempt": routed.attempt,
        "prefill": _side(route.entry_choice),
        "decode": _side(route.decode_choice),
        "answers": placed.decode_worker,
        "local": route.local,
        "fetch": None
        if fetch is None
        else {
            "holder": fetch.holder.partition("@")[0],
            "blocks": fetch.n_blocks,
            "fetch_ms": _ms(fetch.fetch_ms),
            "saved_ms": _ms(fetch.saved_ms),
        },
        "degraded": placed.degraded,
    }


def _side(choice: Choice | None) -> dict[str, Any] | None:
    if choice is None:
        return None
    others = sorted((one for one in choice.candidates if one is not choice.chosen), key=lambda one: one.total_ms)
    return {
        "worker": choice.chosen.worker,
        "rule": choice.rule,
        "gated": choice.gated,
        "candidates": [_fields(one) for one in (choice.chosen, *others[: _MOST_CANDIDATES - 1])],
    }


def _fields(one: Estimate) -> dict[str, Any]:
    return {
        "worker": one.worker,
        "queued_ms": _ms(one.queued_ms),
        "own_ms": _ms(one.own_ms),
        "hit_tokens": one.hit_tokens,
        "requests": one.requests,
    }


def _ms(value: float) -> float:
    return round(value, 3)
