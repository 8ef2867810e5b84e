"""The answer to one request: from the first token to the last byte, streamed or whole.

A stream's status line waits for the first token, so that everything that fails before it has a true status code.
A client that leaves, at any time, ends the work everywhere; so does one that has not read its answer by the deadline.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any  # Any: JSON

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from common.clock import Clock
from common.errors import ServingError
from common.messages.requests import TokenDelta
from gateway.account import Account
from gateway.answer import Choice, Piece, joined
from gateway.chunks import DONE, Usage, Writer, error_chunk
from gateway.core.actions import Routed
from gateway.core.order import Order
from gateway.errors import error_body
from gateway.explain import FIELD, explain_headers, served_fields
from gateway.inbox import ClientLeft, Inbox, News, Sent
from gateway.metrics import GatewayMetrics
from gateway.switchboard import Switchboard
from gateway.timeline import Timeline

_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_WHOLE_HEADERS = [(b"content-type", b"application/json")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that is decided about an answer before it begins."""

    orders: Sequence[Order]
    choices: Sequence[Choice]
    """One per order."""
    prompt_tokens: int
    """Of all prompts, each counted once however many choices it has."""
    choices_per_prompt: int
    writer: Writer
    stream: bool
    include_usage: bool
    explain: bool
    """Whether the client asked how it was served."""
    account: Account
    timeout_ms: float
    """Time from the arrival to the last byte."""


class Reply(Response):
    """Starts the work when it is sent, so that nothing runs that nobody waits for."""

    def __init__(self, plan: Plan, switchboard: Switchboard, metrics: GatewayMetrics, clock: Clock) -> None:
        super().__init__()
        self._plan, self._switchboard, self._metrics, self._clock = plan, switchboard, metrics, clock
        n = len(plan.orders)
        self._arrived_ms, self._account = plan.account.arrived_ms, plan.account
        self._last_ms = [self._arrived_ms] * n
        self._timelines = [self._account.timeline, *(Timeline(self._arrived_ms) for _ in range(n - 1))]
        self._unwritten: list[int] = []  # whose first token is on its way
        self._begun = [False] * n
        self._open = set(range(n))
        self._cached_tokens = 0
        self._error: ServingError | None = None
        self._routes: dict[int, Routed] = {}  # where clients asked how they were routed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer. Raises ServingError while no byte is out."""
        inbox = self._switchboard.submit(self._plan.orders)
        watch = asyncio.create_task(_tell_when_client_leaves(receive, inbox))
        try:
            if self._plan.stream:
                await self._stream(inbox, self._in_time(send))
            else:
                await self._whole(inbox, self._in_time(send))
        except ClientLeft:
            self._metrics.clients_left_total += 1
        finally:
            watch.cancel()
            for order in self._plan.orders:
                self._switchboard.cancel(order.request)
            self._metrics.e2e.observe((self._clock.now_ms() - self._arrived_ms) / 1000)
            self._note_written()  # nothing is left, unless the client has
            self._metrics.timing_violations_total += sum(one.violations for one in self._timelines[1:])
            self._account.cached_tokens, self._account.generated_tokens = self._cached_tokens, self._generated_tokens
            self._metrics.generated_tokens_total += self._generated_tokens

    def _in_time(self, send: Send) -> Send:
        """`send` with an end: what is not out when the request's time is over counts as a client that left.

        A message that needs no waiting goes out even then, so that a client that reads hears of its deadline.
        """

        async def send_in_time(message: Message) -> None:
            left_ms = self._arrived_ms + self._plan.timeout_ms - self._clock.now_ms()
            try:
                async with asyncio.timeout(max(0.0, left_ms) / 1000):
                    await send(message)
            except TimeoutError:
                raise ClientLeft from None

        return send_in_time

    async def _stream(self, inbox: Inbox, send: Send) -> None:
        pieces = await self._first_pieces(inbox)
        if self._error is not None:
            raise self._error
        headers = [*_STREAM_HEADERS, *self._explanation()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        writer = self._plan.writer
        body = b"".join(writer.opening(choice.index) for choice in self._plan.choices)
        while True:
            body += b"".join(writer.chunk(index, joined(batch)) for index, batch in pieces.items())
            if self._error is not None or not self._open:
                break
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
                self._note_written()
            body = b""
            pieces = self._pieces(await inbox.take())
        await send({"type": "http.response.body", "body": body + self._closing(), "more_body": False})

    async def _first_pieces(self, inbox: Inbox) -> dict[int, list[Piece]]:
        """The first new text, or none and an error."""
        pieces: dict[int, list[Piece]] = {}
        while not pieces and self._error is None:
            pieces = self._pieces(await inbox.take())
        return pieces

    def _explanation(self) -> list[tuple[bytes, bytes]]:
        return explain_headers([self._routes[index] for index in sorted(self._routes)])

    def _closing(self) -> bytes:
        """What a stream ends with: an error, or usage and the end mark."""
        self._note_written()
        if self._error is not None:
            self._metrics.broken_streams_total += 1
            return error_chunk(error_body(self._error))
        return (
            self._plan.writer.closing_chunk(self._usage() if self._plan.include_usage else None, self._served()) + DONE
        )

    def _served(self) -> dict[str, Any]:
        """Who served the first choice and how long its phases took, for clients that asked."""
        return {FIELD: served_fields(self._account)} if self._plan.explain else {}

    async def _whole(self, inbox: Inbox, send: Send) -> None:
        batches: list[list[Piece]] = [[] for _ in self._plan.orders]
        while self._open:
            for index, pieces in self._pieces(await inbox.take()).items():
                batches[index] += pieces
            if self._error is not None:
                raise self._error
        body = self._plan.writer.whole([joined(pieces) for pieces in batches], self._usage(), self._served())
        headers = [*_WHOLE_HEADERS, (b"content-length", str(len(body)).encode()), *self._explanation()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    def _pieces(self, news: Sequence[tuple[int, News]]) -> dict[int, list[Piece]]:
        """New text by choice, up to the first error among the news, which is kept in `_error`."""
        found: dict[int, list[Piece]] = {}
        now_ms = self._clock.now_ms()
        for index, one in news:
            if isinstance(one, ServingError):
                self._error = one
                self._account.failed(one, choice=index)
                break
            if isinstance(one, Sent):
                self._note_sent(index, one)
                continue
            if isinstance(one, Routed):
                self._routes[index] = one
                continue
            if index not in self._open:
                continue  # its stop string was reached; the worker did not know yet
            self._observe(index, one, now_ms)
            piece = self._plan.choices[index].push(one)
            found.setdefault(index, []).append(piece)
            if piece.finish is not None:
                self._open.discard(index)
                self._account.finish = self._account.finish or piece.finish
                self._switchboard.cancel(self._plan.orders[index].request)
        return found

    def _observe(self, index: int, delta: TokenDelta, now_ms: float) -> None:
        seconds = (now_ms - self._last_ms[index]) / 1000
        self._last_ms[index] = now_ms
        timeline = self._timelines[index]
        if self._begun[index]:
            replayed = delta.cached_tokens is not None  # the first delta of another attempt
            if delta.timings is not None and timeline.second is None and delta.position == 1 and not replayed:
                timeline.second_token(delta.timings)
                self._metrics.observe_parts(timeline.second_token_ms())
            if delta.tokens:
                self._metrics.itl.observe(seconds / len(delta.tokens), len(delta.tokens))
            return
        self._begun[index] = True
        timeline.first(delta.timings, now_ms)
        self._unwritten.append(index)
        if not self._plan.stream:
            self._note_written()  # what follows is the rest of the answer
        if delta.cached_tokens is not None and index % self._plan.choices_per_prompt == 0:
            self._cached_tokens += delta.cached_tokens
            self._metrics.cached_tokens_total += delta.cached_tokens

    def _note_sent(self, index: int, one: Sent) -> None:
        self._timelines[index].sent(one.begun.begun_ms, one.sent_ms)
        if index == 0:
            placed = one.begun.placed
            self._account.failed_attempts = one.begun.failed
            self._account.workers = {"prefill": placed.entry_worker, "decode": placed.decode_worker}

    def _note_written(self) -> None:
        """All first tokens that were here are on their way to the client."""
        if not self._unwritten:
            return
        now_ms = self._clock.now_ms()
        for index in self._unwritten:
            timeline = self._timelines[index]
            timeline.written(now_ms)
            self._metrics.ttft.observe((now_ms - self._arrived_ms) / 1000)
            self._metrics.observe_parts(timeline.parts_ms())
        self._unwritten.clear()

    @property
    def _generated_tokens(self) -> int:
        return sum(choice.n_tokens for choice in self._plan.choices)

    def _usage(self) -> Usage:
        return Usage(self._plan.prompt_tokens, self._generated_tokens, self._cached_tokens)


async def _tell_when_client_leaves(receive: Receive, inbox: Inbox) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
    inbox.client_left()
