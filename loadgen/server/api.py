"""What a server answers besides generation requests: its pages over GET. I/O only."""

import ssl
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import httpx

from loadgen.drive.connection import parse_server

_TIMEOUT_S = 5.0


class NoAnswer(Exception):
    """The server did not answer a GET, or not with 200; the text says which page and why."""


class ServerApi:
    """One server's pages. Belongs to the running event loop; leave the `async with` block to close its connections.

    It sends what the generator itself sends (headers, no proxies) and is asked about once a second, so a general HTTP
    client is cheap enough.
    """

    def __init__(self, url: str, headers: Mapping[str, str], timeout_s: float = _TIMEOUT_S) -> None:
        """`url` as in `--url`. `headers` may hold secrets and are kept nowhere else. Raises ConfigError."""
        server = parse_server(url)
        scheme = "https" if server.tls else "http"
        self._timeout_s = timeout_s
        self._client = httpx.AsyncClient(
            base_url=f"{scheme}://{server.authority}{server.prefix}",
            headers={"user-agent": "penstock-bench", **headers},
            timeout=timeout_s,
            trust_env=False,
            verify=ssl.create_default_context() if server.tls else False,
        )

    async def get(self, path: str) -> bytes:
        """The body of a page. Raises NoAnswer."""
        try:
            answer = await self._client.get(path)
        except httpx.TimeoutException as error:
            raise NoAnswer(f"GET {path}: no answer within {self._timeout_s:g} s") from error
        except httpx.HTTPError as error:
            raise NoAnswer(f"GET {path}: {error or type(error).__name__}") from error
        if answer.status_code != httpx.codes.OK:
            raise NoAnswer(f"GET {path}: HTTP {answer.status_code}")
        return answer.content

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()
