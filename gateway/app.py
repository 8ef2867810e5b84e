"""The HTTP application: routes inside, the border around them."""

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp

from common.errors import ServingError
from gateway.account import Account
from gateway.api_keys import ApiKeys
from gateway.border import CLIENT_LEFT_STATUS, Border, Watch
from gateway.errors import MethodNotAllowed, NotFound, cut, error_response
from gateway.openapi import OpenApiRoute
from gateway.routes_admin import AdminRoutes
from gateway.routes_openai import OpenAiRoutes
from gateway.routes_status import StatusRoutes


def build_app(openai: OpenAiRoutes, status: StatusRoutes, admin: AdminRoutes, watch: Watch, keys: ApiKeys) -> ASGIApp:
    """Everything behind one callable."""
    app = FastAPI(title="Penstock", openapi_url=None)  # a generated description would lack the bodies
    OpenApiRoute(keys).add_to(app)
    openai.add_to(app)
    status.add_to(app)
    admin.add_to(app)
    app.add_exception_handler(ServingError, _serving_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _client_left)
    return Border(app, watch, keys)


async def _serving_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    account: Account | None = getattr(request.state, "account", None)
    if account is not None:
        account.failed(error.in_phase("queue"))  # what ends later says so itself
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """The framework's own: unknown paths and wrong methods."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return error_response(NotFound(f"{cut(request.url.path)} does not exist here"))
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        response = error_response(MethodNotAllowed(f"{request.method} is not allowed here; {allowed} is"))
        response.headers["allow"] = allowed
        return response
    raise error


async def _client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT_STATUS)  # nobody reads it; it only has to end the request
