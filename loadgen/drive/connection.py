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

_LONGEST_LABEL = 63  # RFC 1035, 2.3.4
_REUSE_WITHIN_S = 2.0
"""Idle connections older than this are not used again: servers close theirs after 5 s, often while we write."""


class ResponseSink(Protocol):
    """Who hears of one response. `on_end`, `on_lost` or `on_broken` comes last and once. Times are those of the connection's clock."""

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

    def on_broken(self, reason: str) -> None:
        """What came is not an HTTP answer, or nobody could read it."""
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
    _refuse_unusable(url)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"--url={url!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url={url!r}: must be http://host:port or https://host:port")
    if parts.query or parts.fragment or port == 0:
        raise ConfigError(f"--url={url!r}: must have no ? and no #, and a port from 1 to 65535")
    _refuse_host(url, parts.hostname)
    tls = parts.scheme == "https"
    prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return Server(parts.hostname, (443 if tls else 80) if port is None else port, tls, prefix)


def _refuse_unusable(url: str) -> None:
    """What urlsplit would let through, or repeat in its message though it is a secret. Raises ConfigError."""
    if "@" in url:
        raise ConfigError("--url: must not hold a user name or a password; give a secret with --api-key or --header")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"--url={url!r}: must be printable ASCII: %XX in a path, xn-- in a host name")


def _refuse_host(url: str, host: str) -> None:
    labels = host.removesuffix(".").split(".")
    if ":" not in host and not all(0 < len(label) <= _LONGEST_LABEL for label in labels):
        raise ConfigError(f"--url={url!r}: parts of a host name must have 1 to {_LONGEST_LABEL} letters")


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
        except httptools.HttpParserCallbackError as error:  # the sink failed, not the parser
            self._break(f"unreadable: {error.__context__!r}")
        except httptools.HttpParserError as error:
            self._break(f"not HTTP/1.1: {error}")
        except httptools.HttpParserUpgrade:
            self._break("the server wants another protocol than HTTP/1.1")

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._transport = None
        self._lose(str(exc) if exc else "the server closed the connection")

    def _lose(self, reason: str) -> None:
        sink = self._sink
        self.abandon()
        if sink is not None:
            sink.on_lost(reason)

    def _break(self, reason: str) -> None:
        sink = self._sink
        self.abandon()
        if sink is not None:
            sink.on_broken(reason)

    @property
    def _is_interim(self) -> bool:
        """True in a 1xx answer: the real one follows (RFC 9110, 15.2)."""
        return self._parser.get_status_code() < 200

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        if self._sink is not None and not self._is_interim:
            self._sink.on_head(self._parser.get_status_code(), self._headers)

    def on_body(self, piece: bytes) -> None:
        """Called by the parser."""
        if self._sink is not None:
            self._sink.on_body(piece, self._at_s)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if self._is_interim:
            self._headers = {}
            return
        if self._sink is None:
            return
        self._sink.on_end()
        self._sink = None  # not sooner: if it fails, it must hear of that
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
