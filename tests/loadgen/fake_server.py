"""A scripted OpenAI-compatible server in the test's own process: what it answers is data, byte for byte."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

DONE = b"data: [DONE]\n\n"


def event(fields: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text_chunk(text: str, token_ids: list[int] | None = None, finish: str | None = None) -> bytes:
    """A chunk of /v1/completions."""
    choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": finish}
    if token_ids is not None:
        choice["token_ids"] = token_ids
    return event({"choices": [choice]})


def usage_chunk(prompt: int, completion: int, cached: int | None = None) -> bytes:
    """The last chunk before [DONE] when usage was asked for."""
    usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if cached is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": cached}
    return event({"choices": [], "usage": usage})


@dataclass(frozen=True)
class Answer:
    """What one request gets: `pieces` are sent one by one, each after the server's loop had a turn."""

    pieces: tuple[bytes, ...] = ()
    status: int = 200
    content_type: str = "text/event-stream"
    ending: str = "whole"
    """`whole`; `cut`: the connection breaks after the pieces; `hang`: nothing more comes, the connection stays."""


@dataclass
class Seen:
    """What the server was sent."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the client closed the connection during a `hang`."""


Script = Callable[[int, dict[str, Any]], Answer]
"""(number of the request, its body) -> answer."""


class FakeServer:
    """Listens on a free port. `seen` lists generation requests in the order of their arrival."""

    def __init__(self, script: Script, models: tuple[str, ...]) -> None:
        self._script, self._models = script, models
        self.seen: list[Seen] = []
        self.pages: dict[str, Callable[[], bytes | int]] = {}
        """Path -> what a GET of it gives now: a body, or an HTTP status without one. Others are 404."""
        self.asked: list[tuple[str, dict[str, str]]] = []
        """Paths and headers of GETs."""
        self.connections = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while await self._serve_one(reader, writer):
                continue
        writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        path = first.split(" ")[1]
        if first.startswith("GET ") and (path in self.pages or not path.endswith("/v1/models")):
            self.asked.append((path, headers))
            page = self.pages.get(path, lambda: 404)()
            status, body = (page, b"") if isinstance(page, int) else (200, page)
            writer.write(_head(status, "text/plain", f"content-length: {len(body)}") + body)
            return True
        if path.endswith("/v1/models"):
            body = json.dumps({"object": "list", "data": [{"id": name} for name in self._models]}).encode()
            writer.write(_head(200, "application/json", f"content-length: {len(body)}") + body)
            return True
        content = json.loads(await reader.readexactly(int(headers["content-length"])))
        seen = Seen(path, headers, content)
        self.seen.append(seen)
        answer = self._script(len(self.seen) - 1, content)
        writer.write(_head(answer.status, answer.content_type, "transfer-encoding: chunked"))
        for piece in answer.pieces:
            writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            await writer.drain()
            await asyncio.sleep(0)
        if answer.ending == "cut":
            return False
        if answer.ending == "hang":
            await reader.read()
            seen.left.set()
            return False
        writer.write(b"0\r\n\r\n")
        return True


def _head(status: int, content_type: str, framing: str) -> bytes:
    return f"HTTP/1.1 {status} X\r\ncontent-type: {content_type}\r\n{framing}\r\n\r\n".encode()


def steady(n_tokens: int | None = None, *, cached: int | None = None) -> Script:
    """One token per chunk, as many as asked for or `n_tokens`, with token ids and usage."""

    def answer(number: int, body: dict[str, Any]) -> Answer:
        total = body["max_tokens"] if n_tokens is None else n_tokens
        chat = "messages" in body
        one = event({"choices": [{"index": 0, "delta": {"content": "x"}, "token_ids": [7]}]}) if chat else b""
        prompt = len(body["messages"][0]["content"].split()) + 5 if chat else len(body["prompt"])
        role = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        chunks = [role, *[one] * total] if chat else [text_chunk("x", [7])] * total
        return Answer((*chunks, usage_chunk(prompt, total, cached), DONE))

    return answer


@asynccontextmanager
async def fake_server(script: Script, models: tuple[str, ...] = ("fake",)) -> AsyncIterator[FakeServer]:
    """A server for the time of the context."""
    fake = FakeServer(script, models)
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    fake.url = f"http://{host}:{port}"
    try:
        yield fake
    finally:
        server.close()
