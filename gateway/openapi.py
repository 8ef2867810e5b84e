"""The gateway's own description of itself, OpenAPI 3.1, served at /openapi.json.

Written from the types and limits that requests are checked with, and from the classes of the errors that each route can
raise; a test compares it with the routes that are there, and fuzzed requests with what it says.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any  # Any: JSON

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from common.errors import (
    BodyTooLarge,
    Busy,
    ContextTooLong,
    DeadlineExceeded,
    InvalidRequest,
    NoWorker,
    PeerFailed,
    RateLimited,
    ServingError,
    UnknownModel,
    UnknownWorker,
)
from common.policy.routing_rules import PIN, RULES
from gateway.api_keys import ApiKeys
from gateway.border import OPEN_PATHS, REQUEST_ID
from gateway.errors import BodyTooSlow, Forbidden, HeadTooLarge, HeadTooSlow, Internal, Unauthorized
from gateway.ignored_fields import HEADER as IGNORED_FIELDS
from gateway.ignored_fields import PATTERN
from gateway.openapi_answers import answer_schemas, ref
from gateway.openapi_bodies import body_schemas
from gateway.routing_wishes import EXPLAIN, MAX_SESSION_CHARACTERS, SESSION
from gateway.routing_wishes import RULES as RULE_HEADERS

Schema = dict[str, Any]
PATH = "/openapi.json"
Errors = tuple[type[ServingError], ...]
_ALWAYS: Errors = (InvalidRequest, HeadTooSlow, HeadTooLarge, Internal)
_BODY: Errors = (BodyTooLarge, BodyTooSlow)
_SERVING: Errors = (*_BODY, ContextTooLong, UnknownModel, Busy, RateLimited, NoWorker, PeerFailed, DeadlineExceeded)
_WHEN = {
    400: "Malformed or out of range: `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "The key is not an operator's.",
    404: "No such model or worker.",
    408: "Headers or body did not come within their time.",
    413: "The body is too large.",
    431: "The headers are too large.",
    429: "This key has used up what it may.",
    500: "A bug of the gateway, or a worker's; its log has the details.",
    502: "A worker broke its promise; the gateway has tried others.",
    503: "No worker can take it now.",
    504: "The request's own time is up.",
}
_REQUEST_ID_HEADER: Schema = {"x-request-id": {"required": True, "schema": {"type": "string"}}}
_IGNORED_HEADER: Schema = {
    IGNORED_FIELDS: {
        "description": "Unknown fields of the body, if there were any: their names, and how many more.",
        "schema": {"type": "string", "pattern": f"^{PATTERN}$"},
    }
}
_BELOW = (400, 408, 431)  # what is no request has no id


@dataclass(frozen=True, slots=True)
class _Operation:
    """One method of one path."""

    method: str
    path: str
    summary: str
    answers: tuple[tuple[int, Schema], ...]
    """Status and content."""
    errors: Errors = ()
    body: str | None = None
    """Schema of the body."""
    explains: bool = False
    """Whether it takes the routing headers."""

    @property
    def is_admin(self) -> bool:
        return self.path.startswith("/admin/")


def _json(name: str) -> Schema:
    return {"application/json": {"schema": ref(name)}}


def _streamed(name: str) -> Schema:
    text = f"With `stream: true`: server-sent events, each `data:` a {name}Chunk or an Error, the last one `[DONE]`."
    events = {"schema": {"type": "string", "description": text}, "x-event-schema": ref(f"{name}Chunk")}
    return {**_json(name), "text/event-stream": events}


_OPERATIONS = (
    _Operation("get", "/v1/models", "The served model, as a list of one.", ((200, _json("Models")),)),
    _Operation("get", "/v1/models/{model}", "The served model.", ((200, _json("Model")),), (UnknownModel,)),
    _Operation(
        "post",
        "/v1/completions",
        "Continue one prompt or several.",
        ((200, _streamed("Completion")),),
        _SERVING,
        "CompletionRequest",
        True,
    ),
    _Operation(
        "post",
        "/v1/chat/completions",
        "Answer a conversation.",
        ((200, _streamed("Chat")),),
        _SERVING,
        "ChatRequest",
        True,
    ),
    _Operation("get", "/health", "200 while the process lives.", ((200, _json("Alive")),)),
    _Operation("get", "/ready", "Whether a request would be served now.", ((200, _json("Ready")),), (NoWorker,)),
    _Operation("get", "/metrics", "Prometheus' text format.", ((200, {"text/plain": {"schema": {"type": "string"}}}),)),
    _Operation("get", "/status", "All that this gateway knows.", ((200, _json("Status")),)),
    _Operation("get", "/status/memory", "Who had which memory lately.", ((200, _json("MemoryHistory")),)),
    _Operation("get", PATH, "This.", ((200, {"application/json": {"schema": {"type": "object"}}}),)),
    _Operation(
        "post", "/admin/workers/{worker}/drain", "Take nothing new.", ((202, _json("Drained")),), (UnknownWorker,)
    ),
    _Operation("post", "/admin/workers/{worker}/resume", "Work again.", ((202, _json("Drained")),), (UnknownWorker,)),
    _Operation(
        "post",
        "/admin/workers/{worker}/memory",
        "Grow or shrink the page memory.",
        ((200, _json("Resized")), (202, _json("Resized"))),
        (*_BODY, UnknownWorker, NoWorker, PeerFailed, DeadlineExceeded),
        "MemoryOrder",
    ),
)


def describe(keys: ApiKeys) -> Schema:
    """The whole description. `keys`: whether clients and operators must send one; their values are not looked at."""
    paths: dict[str, Schema] = {}
    for one in _OPERATIONS:
        paths.setdefault(one.path, {})[one.method] = _operation(one, keys)
    for path in ("/health", "/ready", "/metrics", "/status", "/status/memory"):
        paths[path]["head"] = {**paths[path]["get"], "operationId": f"head {path}"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Penstock", "version": "1", "description": "OpenAI's API, and what operators ask."},
        "paths": paths,
        "components": {
            "schemas": {**body_schemas(), **answer_schemas()},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "--api-key, --api-keys"},
                "operator": {"type": "http", "scheme": "bearer", "description": "--admin-key"},
            },
        },
    }


def _operation(one: _Operation, keys: ApiKeys) -> Schema:
    names = [] if "{" not in one.path else [one.path.partition("{")[2].partition("}")[0]]
    found: Schema = {
        "operationId": f"{one.method} {one.path}",
        "summary": one.summary,
        "parameters": [
            *(_parameter(name, "path", {"type": "string", "minLength": 1}, required=True) for name in names),
            _parameter("x-request-id", "header", {"type": "string", "pattern": f"^{REQUEST_ID.pattern}$"}),
            *(_routing_headers() if one.explains else ()),
        ],
        "responses": _responses(one, keys),
        "security": _security(one, keys),
    }
    if one.body is not None:
        found["requestBody"] = {"required": True, "content": _json(one.body)}
    return found


def _parameter(name: str, place: str, schema: Schema, *, required: bool = False) -> Schema:
    return {"name": name, "in": place, "required": required, "schema": schema}


def _routing_headers() -> Iterable[Schema]:
    yield _parameter(SESSION, "header", {"type": "string", "maxLength": MAX_SESSION_CHARACTERS})
    yield _parameter(EXPLAIN, "header", {"enum": ["0", "1"]})
    for name in RULE_HEADERS.values():
        pinned = {"type": "string", "pattern": f"^{PIN}.+$"}
        yield _parameter(name, "header", {"anyOf": [{"enum": sorted(RULES)}, pinned]})


def _security(one: _Operation, keys: ApiKeys) -> list[Schema]:
    if one.is_admin:
        return [] if keys.open_to_operators else [{"operator": []}]
    if one.path in OPEN_PATHS or not keys.needed:
        return []
    return [{"key": []}, *([{"operator": []}] if one.path.startswith("/status") else [])]


def _responses(one: _Operation, keys: ApiKeys) -> Schema:
    found: Schema = {}
    for status, content in one.answers:
        headers = {**_REQUEST_ID_HEADER}
        if one.explains:
            headers[EXPLAIN] = {"description": "How it was routed, for who asked.", "schema": {"type": "string"}}
            headers |= _IGNORED_HEADER
        found[str(status)] = {"description": one.summary, "headers": headers, "content": content}
    refusals: Errors = (Forbidden,) if one.is_admin else (Unauthorized,) if _security(one, keys) else ()
    for status in sorted({error.http_status for error in (*_ALWAYS, *one.errors, *refusals)}):
        found[str(status)] = {
            "description": _WHEN[status],
            "headers": {
                **({} if status in _BELOW else _REQUEST_ID_HEADER),
                **_error_headers(status),
                **(_IGNORED_HEADER if one.explains else {}),
            },
            "content": _json("Error"),
        }
    return found


def _error_headers(status: int) -> Schema:
    if status in (429, 503):
        whole_seconds = {"type": "string", "pattern": "^[1-9][0-9]*$"}
        return {"retry-after": {"required": True, "schema": whole_seconds, "description": "Seconds."}}
    if status == 401:
        return {"www-authenticate": {"required": True, "schema": {"const": "Bearer"}}}
    return {}


class OpenApiRoute:
    """Serves the description, which is made once."""

    def __init__(self, keys: ApiKeys) -> None:
        self._body = msgspec.json.encode(describe(keys))

    def add_to(self, app: FastAPI) -> None:
        """Register the endpoint."""
        app.add_api_route(PATH, self.answer, methods=["GET"])

    async def answer(self, request: Request) -> Response:
        """The description."""
        return Response(self._body, media_type="application/json")
