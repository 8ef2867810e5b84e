"""HTTP/1.1 connections of the generator: keep-alive, one request at a time, callbacks instead of a task per chunk.

A general HTTP client costs some hundred microseconds per chunk, which is more than many servers need for a token;
here a chunk costs one call from the event loop through httptools' parser.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from common.errors import ConfigError

_REUSE_WITHIN_S = 2.0
"""Idle connections older than this are not used again: servers close theirs after 5 s, often while we write."""


class ResponseSink(Protocol):
    """Who hears of one response. `on_end` or `on_lost` comes last and once. Times are those of the connection's clock."""

    def on_head(self, status: int, headers: Mapping[str, str]) -> None:
        """Status line and headers, names in lower case."""
        ...

    def on_body(self, piece: bytes, at_s: float) -> None:
        """Some bytes of the body."""
        ...

    def on_end(self) -> None:
        """The body is complete."""
        ...

    def on_lost(self, reason: str) -> None:
        """The connection ended before the body did."""
        ...


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go."""

    host: str
    port: int
    tls: bool
    prefix: str
    """Path before `/v1`, without a slash at its end."""

    @property
    def authority(self) -> str:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_server(url: str) -> Server:
    """The server that `url` names; a `/v1` at its end is dropped. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"--url={url!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url={url!r}: must be http://host:port or https://host:port")
    tls = parts.scheme == "https"
    prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return Server(parts.hostname, port or (443 if tls else 80), tls, prefix)


class Connection(asyncio.Protocol):
    """One TCP connection. `begin` starts a request; its sink hears the rest."""

    def __init__(self, on_idle: Callable[["Connection"], None], now_s: Callable[[], float]) -> None:
        self._on_idle, self._now_s = on_idle, now_s
        self._transport: asyncio.Transport | None = None
        self._sink: ResponseSink | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._at_s = 0.0
        self.idle_since_s = 0.0

    @property
    def usable(self) -> bool:
        """True while the connection is open, free and young enough to be used again."""
        if self._transport is None or self._transport.is_closing() or self._sink is not None:
            return False
        return self._now_s() - self.idle_since_s <= _REUSE_WITHIN_S

    def begin(self, request: bytes, sink: ResponseSink) -> None:
        """Send a whole request; `sink` gets the response."""
        if self._transport is None or self._sink is not None:
            raise RuntimeError("a connection carries one request at a time")
        self._sink = sink
        self._parser = httptools.HttpResponseParser(self)
        self._headers = {}
        self._transport.write(request)

    def release(self, sink: ResponseSink) -> None:
        """The sink wants no more: cut the connection if its response has not ended."""
        if self._sink is sink:
            self.abandon()

    def abandon(self) -> None:
        """Cut the connection at once; its sink hears no more."""
        self._sink = None
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not subclasses of it
        self.idle_since_s = self._now_s()

    def data_received(self, data: bytes) -> None:
        """Called by asyncio; everything in `data` counts as arrived now."""
        self._at_s = self._now_s()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._lose(f"not HTTP/1.1: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._transport = None
        self._lose(str(exc) if exc else "the server closed the connection")

    def _lose(self, reason: str) -> None:
        sink, self._sink = self._sink, None
        if self._transport is not None:
            self._transport.abort()
        if sink is not None:
            sink.on_lost(reason)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        if self._sink is not None:
            self._sink.on_head(self._parser.get_status_code(), self._headers)

    def on_body(self, piece: bytes) -> None:
        """Called by the parser."""
        if self._sink is not None:
            self._sink.on_body(piece, self._at_s)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        sink, self._sink = self._sink, None
        if sink is None:
            return
        sink.on_end()
        if self._transport is not None and self._parser.should_keep_alive():
            self.idle_since_s = self._at_s
            self._on_idle(self)
        elif self._transport is not None:
            self._transport.close()


class ConnectionPool:
    """Idle connections to one server; makes new ones as needed, without a limit."""

    def __init__(self, server: Server, now_s: Callable[[], float]) -> None:
        self._server, self._now_s = server, now_s
        self._idle: deque[Connection] = deque()
        self._tls = ssl.create_default_context() if server.tls else None

    async def take(self) -> Connection:
        """A free connection, the last used first. Raises OSError if the server cannot be reached."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
            connection.abandon()
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: Connection(self._idle.append, self._now_s), self._server.host, self._server.port, ssl=self._tls
        )
        return connection

    def close(self) -> None:
        """Cut all idle connections."""
        while self._idle:
            self._idle.pop().abandon()
