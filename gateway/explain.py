"""How a request was routed and who served it, for clients that ask with `x-penstock-explain: 1`.

The decision is known before the first byte and goes into a header; what came of it stands at the answer's end.
"""

from collections.abc import Sequence
from typing import Any  # Any: JSON

import msgspec

from common.policy.estimates import Estimate
from common.policy.routing_rules import Choice
from gateway.account import Account, rounded
from gateway.core.actions import Routed

HEADER = b"x-penstock-explain"
FIELD = "penstock"
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


def served_fields(account: Account) -> dict[str, Any]:
    """Parts of the time to the first token, in milliseconds, and the workers that served it in the end."""
    timeline = account.timeline
    told: dict[str, Any] = {"phases_ms": rounded(timeline.parts_ms()), "workers": account.workers}
    if account.failed_attempts:
        told["failed"] = account.failed_fields()
    if timeline.ttft_ms is not None:
        told["ttft_ms"] = _ms(timeline.ttft_ms)
    if second_ms := timeline.second_token_ms():
        told["second_token_ms"] = rounded(second_ms)
    return told


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
