"""What operators order: a worker to drain, or to work again."""

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from common.ids import WorkerId
from gateway.switchboard import Switchboard

PREFIX = "/admin"


class AdminRoutes:
    """Passes orders on; owns nothing."""

    def __init__(self, switchboard: Switchboard) -> None:
        self._switchboard = switchboard

    def add_to(self, app: FastAPI) -> None:
        """Register the endpoints."""
        app.add_api_route(f"{PREFIX}/workers/{{worker}}/drain", self.drain, methods=["POST"])
        app.add_api_route(f"{PREFIX}/workers/{{worker}}/resume", self.resume, methods=["POST"])

    async def drain(self, request: Request) -> Response:
        """The worker takes nothing new, finishes what it has, and goes on serving its KV. 202: `/status` shows how far it is."""
        return self._order(request, on=True)

    async def resume(self, request: Request) -> Response:
        """The worker takes requests again."""
        return self._order(request, on=False)

    def _order(self, request: Request, *, on: bool) -> Response:
        worker = WorkerId(request.path_params["worker"])
        self._switchboard.drain(worker, on=on)
        body = msgspec.json.encode({"worker": worker, "state": "draining" if on else "resuming"})
        return Response(body, 202, media_type="application/json")
