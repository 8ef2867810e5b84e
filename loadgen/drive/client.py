"""The streaming client: sends planned requests to an OpenAI-compatible server and records what came back when."""

import asyncio
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote

from loadgen.drive.bodies import OutgoingRequest
from loadgen.drive.connection import Connection, ConnectionPool, Server
from loadgen.drive.history import Answer
from loadgen.drive.printable import printable
from loadgen.drive.stream import ResponseStream
from loadgen.results.records import Outcome, RequestRecord


@dataclass(frozen=True, slots=True)
class Due:
    """When a request should have been sent. Seconds."""

    start_s: float
    """The run's start on the client's clock; all times in records count from it."""
    planned_s: float
    held_s: float = 0.0
    waited_s: float = 0.0


class StreamingClient:
    """Sends requests to one server. Belongs to the running event loop; any number of requests at once."""

    def __init__(self, server: Server, path: str, headers: Mapping[str, str], timeout_s: float) -> None:
        """`path` is that of generation requests; `timeout_s` bounds each request from sending to its end."""
        self._loop = asyncio.get_running_loop()
        self._timeout_s = timeout_s
        self._pool = ConnectionPool(server, self.now_s)
        common = {"host": server.authority, "user-agent": "penstock-bench", **headers}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in common.items())
        self._post = f"POST {server.prefix}{path} HTTP/1.1\r\ncontent-type: application/json\r\n{self._headers}"

    def now_s(self) -> float:
        """The clock of all times in records. The event loop's own is too coarse: uvloop's stands still for a round."""
        return time.monotonic()

    async def send(self, request: OutgoingRequest, due: Due) -> tuple[RequestRecord, Answer | None]:
        """Send one request and wait for its end; failures are in the record, never raised.

        Also gives the answer, where `request.keeps_answer` and it came whole.
        """
        sent_s = self.now_s()
        stream = ResponseStream(
            request.cancel_after_tokens, self._loop.create_future(), keeps_answer=request.keeps_answer
        )
        connection: Connection | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._pool.take()
                connection.begin(self._frame(request), stream)
                outcome = Outcome.CANCELLED if request.cancel_after_tokens == 0 else await stream.done
                detail = stream.detail
        except TimeoutError:
            outcome, detail = Outcome.TIMEOUT, f"not done after {self._timeout_s:g} s"
        except OSError as error:
            outcome, detail = Outcome.CONNECT, printable(str(error))
        finally:
            if connection is not None:
                connection.release(stream)
        record = self._record(request, due, sent_s, stream, (outcome, detail))
        return record, stream.answer if request.keeps_answer and outcome is Outcome.OK else None

    def _record(
        self, request: OutgoingRequest, due: Due, sent_s: float, stream: ResponseStream, ended: tuple[Outcome, str]
    ) -> RequestRecord:
        usage, details = stream.usage, stream.usage.prompt_tokens_details if stream.usage else None
        return RequestRecord(
            index=request.index,
            request_id=request.request_id,
            conversation=request.conversation,
            turn=request.turn,
            group=request.group,
            held_s=due.held_s,
            waited_s=due.waited_s,
            planned_s=due.planned_s,
            sent_s=sent_s - due.start_s,
            end_s=self.now_s() - due.start_s,
            outcome=ended[0],
            detail=ended[1],
            http_status=stream.http_status,
            asked_input_tokens=request.input_tokens,
            asked_output_tokens=request.output_tokens,
            input_tokens=usage.prompt_tokens if usage else None,
            output_tokens=stream.output_tokens,
            counted_by=stream.counted_by,
            cached_tokens=details.cached_tokens if details else None,
            finish_reason=stream.finish_reason,
            workers=stream.account.workers,
            phases_ms=stream.account.phases_ms,
            chunk_s=array("d", [at_s - due.start_s for at_s in stream.chunk_s]),
            chunk_tokens=stream.chunk_tokens if stream.tokens_known else None,
        )

    def _frame(self, request: OutgoingRequest) -> bytes:
        session = (
            f"x-session-id: {quote(request.session)}\r\n" if request.session else ""
        )  # a trace may name it anything
        length = f"content-length: {len(request.body)}\r\n"
        head = f"{self._post}x-request-id: {request.request_id}\r\n{session}{length}\r\n"
        return head.encode("latin-1") + request.body

    def close(self) -> None:
        """Cut idle connections."""
        self._pool.close()
