"""HTTP/1.1 from bytes, with an end to what comes before a body: uvicorn's protocol bounds neither a head's length nor its time.

Refusals are answered here, below the application, in the application's own words.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from common.errors import InvalidRequest, ServingError
from gateway.errors import HeadTooLarge, HeadTooSlow, error_body

MAX_HEAD_BYTES = 65_536
"""Of the first line and the headers. Beside it a connection holds at most what one read gives, 256 KiB."""
_LINE_BYTES = 4  # between a header's name and its value, and after it
HEAD_TIMEOUT_S = 30.0
_PHRASES = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class BoundedHttp(HttpToolsProtocol):
    """One connection."""

    _head_bytes = 0
    """Received since the last head or piece of a body was complete."""
    _lines_bytes = 0
    """Of the headers of the present head, which may have come in one read with its end."""
    _is_too_large = False
    """The present head: it is refused as such."""
    _head_timer: asyncio.TimerHandle | None = None
    _idle_timer: asyncio.TimerHandle | None = None
    """While bytes are read: runs since the last answer, until the next request begins. A rest of a body is no request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As in the base; the first head has its time from now on."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """As in the base."""
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """As in the base, unless a head becomes too long."""
        self._head_bytes += len(data)
        idle, self.timeout_keep_alive_task = self.timeout_keep_alive_task, None  # the base would stop it for any byte
        self._idle_timer = idle
        super().data_received(data)
        self.timeout_keep_alive_task, self._idle_timer = self._idle_timer, None
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(_too_large())

    def on_message_begin(self) -> None:
        """As in the base; this head has its time from now on."""
        super().on_message_begin()
        self._lines_bytes = 0
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        if self._head_timer is None:
            self._expect_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        """As in the base."""
        self._lines_bytes += len(name) + len(value) + _LINE_BYTES
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """As in the base, which would also begin to serve a head that is too long and came in one read."""
        if self._lines_bytes + len(self.url) > MAX_HEAD_BYTES:
            self._is_too_large = True
            raise _too_large()  # the parser stops, and has `send_400_response` called
        self._head_bytes = 0
        self._end_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """As in the base."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """As in the base."""
        self._head_bytes = 0
        super().on_message_complete()

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self._refuse(HeadTooSlow(f"the headers were not complete after {HEAD_TIMEOUT_S:g} s"))

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or too much of it."""
        self._refuse(_too_large() if self._is_too_large else InvalidRequest(msg))

    def _refuse(self, error: ServingError) -> None:
        body, status = error_body(error), error.http_status
        head = (
            b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            % (status, _PHRASES[status], len(body))
        )
        self.transport.write(head + body)
        self.transport.close()


def _too_large() -> HeadTooLarge:
    return HeadTooLarge(f"what comes before a body may have {MAX_HEAD_BYTES} bytes at most")
