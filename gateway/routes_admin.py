"""What operators order: a worker to drain, to work again, or to have more or less page memory."""

from typing import Any  # Any: JSON

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from common.errors import InvalidRequest
from common.ids import WorkerId
from common.units import parse_bytes
from gateway.border import ADMIN, read_body
from gateway.switchboard import Switchboard

_MAX_BODY_BYTES = 4096


class _Memory(msgspec.Struct, forbid_unknown_fields=True):
    device_memory: str | int


class AdminRoutes:
    """Passes orders on; owns nothing."""

    def __init__(self, switchboard: Switchboard) -> None:
        self._switchboard = switchboard

    def add_to(self, app: FastAPI) -> None:
        """Register the endpoints."""
        for order, endpoint in (("drain", self.drain), ("resume", self.resume), ("memory", self.memory)):
            app.add_api_route(f"{ADMIN}/workers/{{worker}}/{order}", endpoint, methods=["POST"])

    async def drain(self, request: Request) -> Response:
        """The worker takes nothing new, finishes what it has, and goes on serving its KV. 202: `/status` shows how far it is."""
        return self._order(request, on=True)

    async def resume(self, request: Request) -> Response:
        """The worker takes requests again."""
        return self._order(request, on=False)

    async def memory(self, request: Request) -> Response:
        """The worker grows or shrinks its page memory, by `{"device_memory": "6GiB"}`, and goes on serving.

        200: done. 202: pages that are in use leave when they are released, and `/status` shows how far it is.
        """
        worker = WorkerId(request.path_params["worker"])
        answer = await self._switchboard.resize(worker, read_size(await read_body(request, _MAX_BODY_BYTES)))
        if answer.problem:
            raise InvalidRequest(answer.problem, param="device_memory")
        done = answer.device_memory_bytes == answer.target_bytes and not answer.leaving_pages
        fields = {name: getattr(answer, name) for name in answer.__struct_fields__ if name not in ("call", "problem")}
        return _json({"worker": worker, "state": "resized" if done else "leaving", **fields}, 200 if done else 202)

    def _order(self, request: Request, *, on: bool) -> Response:
        worker = WorkerId(request.path_params["worker"])
        self._switchboard.drain(worker, on=on)
        return _json({"worker": worker, "state": "draining" if on else "resuming"}, 202)


def read_size(body: bytes) -> int:
    """The bytes that an order asks for. Raises InvalidRequest."""
    try:
        asked = msgspec.json.decode(body, type=_Memory).device_memory
        size_bytes = parse_bytes(asked) if isinstance(asked, str) else asked
    except (ValueError, OverflowError) as error:  # msgspec's are ValueErrors
        text = f'{error}; this takes {{"device_memory": "6GiB"}}'
        raise InvalidRequest(text, param="device_memory") from error
    if not 0 < size_bytes < 2**63:
        raise InvalidRequest(f"device_memory={asked!r} is no size that memory can have", param="device_memory")
    return size_bytes


def _json(fields: dict[str, Any], status: int) -> Response:
    return Response(msgspec.json.encode(fields), status, media_type="application/json")
