"""One streamed answer: HTTP body in, content chunks with their times and the request's outcome out."""

import asyncio
from array import array
from collections.abc import Mapping
from typing import Annotated, Any  # Any: JSON of an error answer

import msgspec

from loadgen.drive.history import Answer
from loadgen.drive.printable import printable
from loadgen.drive.sse import SseParser
from loadgen.results.records import Outcome

_BODY_LIMIT_BYTES = 2**16
_DETAIL_CHARACTERS = 300
_FULL_STATUSES = (429, 503)
_Milliseconds = Annotated[float, msgspec.Meta(ge=-1e10, le=1e10)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**31)]


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """The same in newer servers."""

    @property
    def text(self) -> str | None:
        return self.content or self.reasoning_content or self.reasoning


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class PromptDetails(msgspec.Struct):
    """What a usage says of the prompt."""

    cached_tokens: _Count | None = None


class Usage(msgspec.Struct):
    """The server's count of tokens; what it leaves out is None."""

    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    prompt_tokens_details: PromptDetails | None = None


class ServerAccount(msgspec.Struct):
    """What Penstock says of a request it served, when asked to explain."""

    phases_ms: dict[str, _Milliseconds] = {}
    workers: dict[str, str] = {}


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Any = None
    penstock: ServerAccount | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class ResponseStream:
    """The sink of one response; `done` resolves with the outcome as soon as it is certain."""

    def __init__(
        self, cancel_after_tokens: int | None, done: "asyncio.Future[Outcome]", *, keeps_answer: bool = False
    ) -> None:
        """`cancel_after_tokens`: be done, as cancelled, once so many tokens came; None: never."""
        self.done, self.detail = done, ""
        self.http_status: int | None = None
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.chunk_s, self.chunk_tokens = array("d"), array("l")
        self.tokens_known = True
        self.account = ServerAccount()
        self._text: list[str] | None = [] if keeps_answer else None
        self._token_ids: list[int] = []
        self._cancel_after_tokens = cancel_after_tokens
        self._sse = SseParser()
        self._error_body = b""
        self._tokens_seen = 0
        self._saw_done = False

    def on_head(self, status: int, headers: Mapping[str, str]) -> None:
        """Status and headers."""
        self.http_status = status
        kind = headers.get("content-type", "nothing")
        if status == 200 and "text/event-stream" not in kind:
            self._finish(Outcome.BAD_STREAM, f"answered {kind} where an event stream was asked for")

    def on_body(self, piece: bytes, at_s: float) -> None:
        """A piece of the body."""
        if self.http_status != 200:
            self._error_body += piece[: _BODY_LIMIT_BYTES - len(self._error_body)]
            return
        try:
            for event in self._sse.feed(piece):
                if self.done.done():  # cancelled or failed: what else is in this piece came too late to count
                    return
                if event == b"[DONE]":
                    self._saw_done = True
                else:
                    self._on_chunk(_decode_chunk(event), at_s)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            self._finish(Outcome.BAD_STREAM, f"unreadable chunk: {error}")

    def _on_chunk(self, chunk: _Chunk, at_s: float) -> None:
        if chunk.error is not None:
            self._finish(Outcome.SERVER_ERROR, _message_of(chunk.error))
            return
        if chunk.usage is not None:
            self.usage = chunk.usage
        if chunk.penstock is not None:
            self.account = chunk.penstock
        for choice in chunk.choices:
            if choice.finish_reason is not None:
                self.finish_reason = choice.finish_reason
            delta = choice.delta
            text = choice.text or (delta is not None and delta.text)
            if not text and not choice.token_ids:
                continue
            if choice.token_ids is None:
                self.tokens_known = False
            if self._text is not None:
                self._text.append(choice.text or (delta.content if delta is not None else None) or "")
                self._token_ids += choice.token_ids or ()
            n_tokens = 1 if choice.token_ids is None else len(choice.token_ids)
            self.chunk_s.append(at_s)
            self.chunk_tokens.append(n_tokens)
            self._tokens_seen += n_tokens
        if self._cancel_after_tokens is not None and self._tokens_seen >= self._cancel_after_tokens:
            self._finish(Outcome.CANCELLED)

    def on_end(self) -> None:
        """The body is complete."""
        if self.http_status != 200:
            outcome = Outcome.REJECTED if self.http_status in _FULL_STATUSES else Outcome.HTTP_ERROR
            self._finish(outcome, f"HTTP {self.http_status}: {error_text(self._error_body)}")
        elif not self._saw_done:
            self._break_off("the stream ended without [DONE]")
        elif not self.chunk_s:
            self._finish(Outcome.EMPTY, "the stream held no token")
        else:
            self._finish(Outcome.OK)

    def on_lost(self, reason: str) -> None:
        """The connection broke."""
        where = "before the answer began" if self.http_status is None else f"after {len(self.chunk_s)} chunks"
        self._break_off(f"{reason}, {where}")

    def on_broken(self, reason: str) -> None:
        """What came is not an HTTP answer."""
        self._finish(Outcome.BAD_STREAM, reason)

    def _break_off(self, reason: str) -> None:
        if self._sse.n_events == 0 and (line := self._sse.strange_line()) is not None:
            self._finish(
                Outcome.BAD_STREAM, f"not an event stream: {line[:_DETAIL_CHARACTERS].decode(errors='replace')}"
            )
        else:
            self._finish(Outcome.CUT, reason)

    def _finish(self, outcome: Outcome, detail: str = "") -> None:
        if not self.done.done():
            self.detail = printable(detail[:_DETAIL_CHARACTERS])
            self.done.set_result(outcome)

    @property
    def answer(self) -> Answer:
        """The answer so far. Raises RuntimeError unless it was to be kept."""
        if self._text is None:
            raise RuntimeError("this stream does not keep its answer")
        known = tuple(self._token_ids) if self.tokens_known else None
        return Answer("".join(self._text), known, self.output_tokens)

    @property
    def output_tokens(self) -> int:
        """Tokens that came: the server's count if it gave one, else what the chunks say."""
        counted = self._counted_by_server
        return self._tokens_seen if counted is None else counted

    @property
    def counted_by(self) -> str:
        """Where `output_tokens` comes from."""
        if self._counted_by_server is not None:
            return "usage"
        return "token_ids" if self.tokens_known and self.chunk_s else "chunks"

    @property
    def _counted_by_server(self) -> int | None:
        return None if self.usage is None else self.usage.completion_tokens


def _message_of(error: Any) -> str:
    if isinstance(error, dict):
        return str(error.get("message", error))
    return str(error)


def error_text(body: bytes) -> str:
    """What an error answer says, in printable characters: the message of OpenAI's shape, else the body itself."""
    try:
        answer = msgspec.json.decode(body)
        text = _message_of(answer.get("error", answer) if isinstance(answer, dict) else answer)
    except (msgspec.MsgspecError, RecursionError):
        text = body.decode(errors="replace").strip() or "no body"
    return printable(text[:_DETAIL_CHARACTERS])
