"""An HTTP server that answers every request at once with one token: what stands behind a proxying router.

python -m benchmarks._http_worker PORT
"""

import asyncio
import sys
from typing import cast

import uvloop

_BODY = (
    b'{"id":"cmpl-1","object":"text_completion","created":1,"model":"letters","choices":[{"index":0,"text":"a",'
    b'"logprobs":null,"finish_reason":"length"}],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}'
)
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(_BODY) + _BODY


class OneToken(asyncio.Protocol):
    """One connection; requests come one after the other or piled up."""

    def __init__(self) -> None:
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class

    def data_received(self, data: bytes) -> None:
        rest, answers = self._rest + data, 0
        while (end := rest.find(b"\r\n\r\n")) >= 0:
            length = _content_length(rest[:end].lower())
            if len(rest) < end + 4 + length:
                break
            rest = rest[end + 4 + length :]
            answers += 1
        self._rest = rest
        if answers:
            self._transport.write(_ANSWER * answers)


def _content_length(head: bytes) -> int:
    at = head.find(b"content-length:")
    return int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(OneToken, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
