"""What a client may say about where its request goes: session, priority, rules for experiments, an explanation."""

from dataclasses import dataclass

from starlette.datastructures import Headers

from common.errors import InvalidRequest
from common.policy.routing_rules import rule_named
from gateway.openai_schema import AnswerRequest

SESSION, EXPLAIN = "x-session-id", "x-penstock-explain"
RULES = {"prefill": "x-penstock-route-prefill", "decode": "x-penstock-route-decode"}
MAX_SESSION_CHARACTERS = 256
MAX_PRIORITY = 1_000


@dataclass(frozen=True, slots=True)
class RoutingWishes:
    """As in Order."""

    session: str | None
    priority: int
    prefill_rule: str | None
    decode_rule: str | None
    explain: bool


def read_routing_wishes(headers: Headers, body: AnswerRequest) -> RoutingWishes:
    """Headers win over the body: `prompt_cache_key` or `user` name a session too. Raises InvalidRequest."""
    session = headers.get(SESSION) or body.prompt_cache_key or body.user
    if session is not None and len(session) > MAX_SESSION_CHARACTERS:
        text = f"a session's name may have {MAX_SESSION_CHARACTERS} characters at most, not {len(session)}"
        raise InvalidRequest(text, param=SESSION)
    priority = body.priority or 0
    if not 0 <= priority <= MAX_PRIORITY:
        text = f"priority must be 0 (first) to {MAX_PRIORITY} (last), not {priority}; only keys can have a head start"
        raise InvalidRequest(text, param="priority")
    explain = headers.get(EXPLAIN, "0")
    if explain not in ("0", "1"):
        raise InvalidRequest(f"{EXPLAIN} must be 1 (or 0), not {explain!r}", param=EXPLAIN)
    return RoutingWishes(session or None, priority, _rule(headers, "prefill"), _rule(headers, "decode"), explain == "1")


def _rule(headers: Headers, side: str) -> str | None:
    name = headers.get(RULES[side])
    if name is None:
        return None
    try:
        return rule_named(name).name
    except InvalidRequest as error:
        raise InvalidRequest(f"{RULES[side]}: {error}", param=RULES[side]) from error
