"""Errors as OpenAI's API shows them: `{"error": {"message", "type", "param", "code"}}` with a true status code."""

import math

import msgspec
from starlette.responses import Response

from common.errors import Busy, Rejected, ServingError

RETRY_AFTER_S = 1  # where nobody knows better
_MOST_TEXT = 200  # characters
_MOST_MESSAGE = 1_000


class Unauthorized(ServingError):
    """The API key is missing or wrong."""

    code, http_status = "invalid_api_key", 401


class Forbidden(ServingError):
    """The key is not an operator's."""

    code, http_status = "forbidden", 403


class BodyTooSlow(ServingError):
    """The body did not come within its time."""

    code, http_status = "body_too_slow", 408


class HeadTooSlow(ServingError):
    """The headers did not come within their time."""

    code, http_status = "head_too_slow", 408


class HeadTooLarge(ServingError):
    """More headers than anybody needs."""

    code, http_status = "head_too_large", 431


class NotFound(ServingError):
    """No such path."""

    code, http_status = "not_found", 404


class MethodNotAllowed(ServingError):
    """The path exists, the method does not."""

    code, http_status = "method_not_allowed", 405


class Internal(ServingError):
    """A bug of ours, without its details."""


def cut(text: str, most: int = _MOST_TEXT) -> str:
    """A text that may be a client's, with so many characters at most: not it decides how long a log line is."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def error_body(error: ServingError) -> bytes:
    """The JSON object of one error."""
    kind = "invalid_request_error" if error.http_status < 500 else "server_error"
    param = error.param if isinstance(error, Rejected) else None
    fields: dict[str, object] = {
        "message": cut(str(error), _MOST_MESSAGE),
        "type": kind,
        "param": param,
        "code": error.code,
    }
    if error.phase is not None:  # of a request for an answer
        fields |= {"phase": error.phase, "retryable": error.retryable}
    if error.attempts is not None:
        fields["attempts"] = error.attempts
    return msgspec.json.encode({"error": fields})


def retry_after_s(error: ServingError) -> int:
    """Whole seconds until another try may succeed."""
    known_s = error.retry_after_s if isinstance(error, Busy) else None
    return RETRY_AFTER_S if known_s is None else max(1, math.ceil(known_s))


def error_response(error: ServingError) -> Response:
    """The whole answer; busy ones say when to come back."""
    headers = {"retry-after": str(retry_after_s(error))} if error.http_status in (429, 503) else {}
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(error_body(error), error.http_status, headers, "application/json")
