"""What a server answers besides generation requests: its pages over GET. I/O only."""

import asyncio
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from loadgen.drive.connection import Connection, ConnectionPool, parse_server
from loadgen.drive.stream import error_text
from loadgen.drive.whole import WholeAnswer

_TIMEOUT_S = 5.0
_OK = 200
_NO_SUCH_PAGE = (404, 405)


class NoAnswer(Exception):
    """The server did not answer a GET, or not with 200; the text says which page and why."""


class NoPage(NoAnswer):
    """The server has no such page."""


class NoServer(NoAnswer):
    """Nobody answered at all."""


class ServerApi:
    """One server's pages. Belongs to the running event loop; leave the `async with` block to close its connections.

    It uses the generator's own connections: a general HTTP client keeps the event loop busy for some half a millisecond
    at a time, and requests of the run would go out late.
    """

    def __init__(self, url: str, headers: Mapping[str, str], timeout_s: float = _TIMEOUT_S) -> None:
        """`url` as in `--url`. `headers` may hold secrets and are kept nowhere else. Raises ConfigError."""
        self._server, self._timeout_s = parse_server(url), timeout_s
        self._pool = ConnectionPool(self._server, time.monotonic)
        common = {"host": self._server.authority, "user-agent": "penstock-bench", **headers}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in common.items())

    async def get(self, path: str) -> bytes:
        """The body of a page. Raises NoAnswer."""
        answer = WholeAnswer(asyncio.get_running_loop().create_future())
        connection: Connection | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._pool.take()
                connection.begin(self._request(path), answer)
                status, body = await answer.done
        except TimeoutError as error:
            raise NoServer(f"GET {path}: no answer within {self._timeout_s:g} s") from error
        except OSError as error:
            raise NoServer(f"GET {path}: {error}") from error
        finally:
            if connection is not None:
                connection.release(answer)
        if status != _OK:
            kind = NoPage if status in _NO_SUCH_PAGE else NoAnswer
            raise kind(f"GET {path}: HTTP {status}: {error_text(body)}")
        return body

    def _request(self, path: str) -> bytes:
        return f"GET {self._server.prefix}{path} HTTP/1.1\r\n{self._headers}\r\n".encode("latin-1")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.close()
