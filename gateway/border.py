"""The request boundary: what every request passes on its way in and out.

Gives each request its id, asks for the key, counts answers by status, and turns what nobody expected into a 500 with
a traceback in the log. A plain ASGI wrapper, so that a streamed token passes one extra function call.
"""

import asyncio
import re
import secrets
import time
import traceback
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.clock import Clock
from common.errors import BodyTooLarge, InvalidRequest, ServingError
from common.log import Log
from common.units import format_bytes
from gateway.account import ROUTES, Account, trace_context
from gateway.api_keys import ApiKeys
from gateway.errors import BodyTooSlow, Forbidden, Internal, Unauthorized, cut, error_response
from gateway.ignored_fields import HEADER as IGNORED_FIELDS
from gateway.metrics import GatewayMetrics
from gateway.request_log import RequestLog

ADMIN = "/admin"
OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/openapi.json"})
_OPERATORS_TOO = frozenset({"/status", "/status/memory"})
BODY_TIMEOUT_S = 30.0
CLIENT_LEFT_STATUS = 499  # never sent; how proxies log a client that did not wait
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_KNOWN_PATH = re.compile(
    r"/(v1/(models|completions|chat/completions)|health|ready|metrics|openapi\.json|status(/memory)?|admin/workers/\{id\}/(drain|resume|memory))"
)
_ADMIN_PATH = re.compile(r"^(/admin/workers/)[^/]+/(drain|resume|memory)$")


@dataclass(frozen=True, slots=True)
class Watch:
    """Whom the border tells of requests."""

    metrics: GatewayMetrics
    log: Log
    requests: RequestLog
    clock: Clock


class Border:
    """Wraps the application."""

    def __init__(self, app: ASGIApp, watch: Watch, keys: ApiKeys) -> None:
        self._app, self._metrics, self._log = app, watch.metrics, watch.log
        self._watch, self._keys = watch, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, from its first byte to its last."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id")
        acceptable = given is not None and REQUEST_ID.fullmatch(given) is not None
        request_id = given if given is not None and acceptable else f"req-{secrets.token_hex(8)}"
        account = self._account(scope, request_id)
        scope.setdefault("state", {}).update(request_id=request_id, account=account, key_name="")
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if account is not None and account.ignored.header:
                    headers[IGNORED_FIELDS] = account.ignored.header
                    self._metrics.ignored_fields_total += account.ignored.total
            await send(message)

        try:
            if given is not None and not acceptable:
                text = "x-request-id must be 1 to 128 letters, digits, dots, dashes, underscores or colons"
                raise InvalidRequest(text, param="x-request-id")
            self._check_key(scope)
            await self._app(scope, receive, send_with_id)
        except ServingError as error:
            if account is not None:
                account.failed(error.in_phase("queue"))  # what ends later says so itself
            await error_response(error)(scope, receive, send_with_id)
        except Exception:  # noqa: BLE001  the request boundary: one request's bug must not end the others
            self._log.event("bug", request=request_id, path=cut(scope["path"]), traceback=traceback.format_exc())
            bug = Internal(f"the gateway failed; its log has the details under request {request_id}")
            if account is not None:
                account.failed(bug.in_phase("gateway"))
            if status is None:
                await error_response(bug)(scope, receive, send_with_id)
        finally:
            path = _ADMIN_PATH.sub(r"\1{id}/\2", scope["path"])  # a label of its own for every id would never end
            path = path if _KNOWN_PATH.fullmatch(path) else "other"
            answered = CLIENT_LEFT_STATUS if status is None else status
            self._metrics.answers[path, answered] += 1
            if account is not None:
                self._close(account, answered, scope["state"]["key_name"])

    def _account(self, scope: Scope, request_id: str) -> Account | None:
        """Of a request for an answer."""
        if scope["path"] not in ROUTES or scope["method"] != "POST":
            return None
        parent, state = trace_context(Headers(scope=scope))
        return Account(
            request=request_id,
            path=scope["path"],
            arrived_ms=self._watch.clock.now_ms(),
            arrived_unix_ns=time.time_ns(),
            traceparent=parent,
            tracestate=state,
        )

    def _close(self, account: Account, status: int, key: str) -> None:
        account.status, account.key, account.ended_ms = status, key, self._watch.clock.now_ms()
        account.timeline.ended(account.ended_ms, account.failed_timings)
        self._metrics.timing_violations_total += account.timeline.violations
        if account.timeline.first_ms is None:
            self._metrics.observe_parts(account.timeline.parts_ms())
        self._watch.requests.ended(account)

    def _check_key(self, scope: Scope) -> None:
        """Raises Unauthorized, or Forbidden for an order of somebody who is no operator."""
        if scope["path"] in OPEN_PATHS:
            return
        kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        given_key = given.encode("latin-1").strip(b" \t") if kind.lower() == "bearer" else b""  # its bytes, as sent
        if scope["path"].startswith(f"{ADMIN}/"):
            if not self._keys.is_admin(given_key):
                raise Forbidden("this needs the operators' key (--admin-key): send it as 'Authorization: Bearer <key>'")
            return
        if not self._keys.needed:
            return
        if scope["path"] in _OPERATORS_TOO and self._keys.is_admin(given_key):
            return
        name = self._keys.name_of(given_key)
        if name is None:
            raise Unauthorized("a valid API key is required: send it as 'Authorization: Bearer <key>'")
        scope["state"]["key_name"] = name


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The whole body. Raises BodyTooLarge as soon as its length is announced or reached, BodyTooSlow."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit_bytes:
        raise _too_large(limit_bytes, f"{format_bytes(int(announced))} were announced")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                body += part
                if len(body) > limit_bytes:
                    raise _too_large(limit_bytes, "more came")
    except TimeoutError:
        raise BodyTooSlow(f"the body was not complete after {BODY_TIMEOUT_S:g} s") from None
    return bytes(body)


def _too_large(limit_bytes: int, found: str) -> BodyTooLarge:
    return BodyTooLarge(f"the body may have {format_bytes(limit_bytes)} at most; {found}")
