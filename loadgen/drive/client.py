"""The streaming client: sends planned requests to an OpenAI-compatible server and records what came back when."""

import asyncio
import time
from array import array
from collections.abc import Mapping

import msgspec

from loadgen.drive.connection import Connection, ConnectionPool, Server
from loadgen.drive.stream import ResponseStream, error_text
from loadgen.results.records import Outcome, RequestRecord
from loadgen.workload.random_prompts import PlannedRequest


class _Card(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Card]


class _Whole:
    """Takes one response whole; `done` resolves with (status, body)."""

    def __init__(self, done: "asyncio.Future[tuple[int, bytes]]") -> None:
        self.done, self._status, self._body = done, 0, b""

    def on_head(self, status: int, headers: Mapping[str, str]) -> None:
        self._status = status

    def on_body(self, piece: bytes, at_s: float) -> None:
        self._body += piece

    def on_end(self) -> None:
        if not self.done.done():
            self.done.set_result((self._status, self._body))

    def on_lost(self, reason: str) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(reason))


class StreamingClient:
    """Sends requests to one server. Belongs to the running event loop; any number of requests at once."""

    def __init__(self, server: Server, path: str, headers: Mapping[str, str], timeout_s: float) -> None:
        """`path` is that of generation requests; `timeout_s` bounds each request from sending to its end."""
        self._loop = asyncio.get_running_loop()
        self._server, self._timeout_s = server, timeout_s
        self._pool = ConnectionPool(server, self.now_s)
        common = {"host": server.authority, "user-agent": "penstock-bench", **headers}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in common.items())
        self._post = f"POST {server.prefix}{path} HTTP/1.1\r\ncontent-type: application/json\r\n{self._headers}"

    def now_s(self) -> float:
        """The clock of all times in records. The event loop's own is too coarse: uvloop's stands still for a round."""
        return time.monotonic()

    async def models(self) -> list[str]:
        """Ids of the models that the server offers. Raises OSError, TimeoutError or ValueError saying what is wrong."""
        async with asyncio.timeout(self._timeout_s):
            connection = await self._pool.take()
            whole = _Whole(self._loop.create_future())
            request = f"GET {self._server.prefix}/v1/models HTTP/1.1\r\n{self._headers}\r\n"
            connection.begin(request.encode("latin-1"), whole)
            status, body = await whole.done
        if status != 200:
            raise ValueError(f"GET /v1/models: HTTP {status}: {error_text(body)}")
        try:
            return [card.id for card in msgspec.json.decode(body, type=_Models).data]
        except msgspec.MsgspecError as error:
            raise ValueError(f"GET /v1/models: not a list of models: {error}") from error

    async def send(self, request: PlannedRequest, request_id: str, start_s: float, planned_s: float) -> RequestRecord:
        """Send one request and wait for its end; failures are in the record, never raised.

        `start_s` is the run's start on `now_s`'s clock; `planned_s` counts from it.
        """
        sent_s = self.now_s()
        stream = ResponseStream(request.cancel_after_tokens, self._loop.create_future())
        connection: Connection | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._pool.take()
                connection.begin(self._frame(request.body, request_id), stream)
                outcome = Outcome.CANCELLED if request.cancel_after_tokens == 0 else await stream.done
                detail = stream.detail
        except TimeoutError:
            outcome, detail = Outcome.TIMEOUT, f"not done after {self._timeout_s:g} s"
        except OSError as error:
            outcome, detail = Outcome.CONNECT, str(error)
        finally:
            if connection is not None:
                connection.release(stream)
        usage, details = stream.usage, stream.usage.prompt_tokens_details if stream.usage else None
        return RequestRecord(
            index=request.index,
            request_id=request_id,
            planned_s=planned_s,
            sent_s=sent_s - start_s,
            end_s=self.now_s() - start_s,
            outcome=outcome,
            detail=detail,
            http_status=stream.http_status,
            asked_input_tokens=request.input_tokens,
            asked_output_tokens=request.output_tokens,
            input_tokens=usage.prompt_tokens if usage else None,
            output_tokens=stream.output_tokens,
            counted_by=stream.counted_by,
            cached_tokens=details.cached_tokens if details else None,
            finish_reason=stream.finish_reason,
            chunk_s=array("d", [at_s - start_s for at_s in stream.chunk_s]),
            chunk_tokens=stream.chunk_tokens if stream.tokens_known else None,
        )

    def _frame(self, body: bytes, request_id: str) -> bytes:
        head = f"{self._post}x-request-id: {request_id}\r\ncontent-length: {len(body)}\r\n\r\n"
        return head.encode("latin-1") + body

    def close(self) -> None:
        """Cut idle connections."""
        self._pool.close()
