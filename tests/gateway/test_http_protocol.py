"""A connection without a request that runs always has a timer that ends it, whatever bytes come."""

import asyncio

import pytest
from starlette.types import Receive, Scope, Send
from uvicorn import Config
from uvicorn.server import ServerState

from gateway.http_protocol import MAX_HEAD_BYTES, BoundedHttp

GET = b"GET /health HTTP/1.1\r\nHost: a\r\n"


class Wire(asyncio.Transport):
    """Takes what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.closed, self.written = False, b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        """Bytes come when the test says so."""

    def resume_reading(self) -> None:
        """Bytes come when the test says so."""


async def health(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers without reading the body."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


async def answered(first: bytes) -> tuple[BoundedHttp, Wire]:
    """A connection that got its answer."""
    config = Config(health, http=BoundedHttp, lifespan="off", log_level="error")
    config.load()
    one, wire = BoundedHttp(config, ServerState(), {}), Wire()
    one.connection_made(wire)
    one.data_received(first)
    await asyncio.gather(*one.tasks)
    assert wire.written.startswith(b"HTTP/1.1 200 ")
    return one, wire


@pytest.mark.parametrize(
    ("head", "rest"),
    [
        (GET + b"Content-Length: 1000\r\n\r\n", [b"x"]),
        (GET + b"Content-Length: 2\r\n\r\n", [b"x", b"x"]),
        (GET + b"Transfer-Encoding: chunked\r\n\r\n", [b"1\r\n", b"x\r\n"]),
        (GET + b"\r\n", [b"\r\n"]),
    ],
)
def test_bytes_after_an_answer_that_begin_no_request_win_no_time(head: bytes, rest: list[bytes]) -> None:
    async def play() -> None:
        one, wire = await answered(head)
        timer = one.timeout_keep_alive_task
        for piece in rest:
            one.data_received(piece)
        assert timer is not None and one.timeout_keep_alive_task is timer and not timer.cancelled()
        one.timeout_keep_alive_handler()
        assert wire.closed
        one.connection_lost(None)

    asyncio.run(play())


def test_the_next_request_ends_the_wait_for_it_also_behind_the_rest_of_a_body() -> None:
    async def play() -> None:
        one, _ = await answered(GET + b"Content-Length: 2\r\n\r\n")
        timer = one.timeout_keep_alive_task
        one.data_received(b"xxGET /health HT")
        assert timer is not None and timer.cancelled() and one.timeout_keep_alive_task is None
        assert one._head_timer is not None and not one._head_timer.cancelled()
        one.connection_lost(None)

    asyncio.run(play())


@pytest.mark.parametrize("reads", [1, 3])
@pytest.mark.parametrize("kind", ["header", "headers", "url"])
@pytest.mark.parametrize(("extra_bytes", "status"), [(-100, 200), (40, 431), (100_000, 431)])
def test_a_head_is_refused_beyond_its_limit_however_it_comes(
    kind: str, extra_bytes: int, status: int, reads: int
) -> None:
    n_bytes = MAX_HEAD_BYTES + extra_bytes
    heads = {
        "header": GET + b"x-a: " + b"a" * (n_bytes - 40) + b"\r\n\r\n",
        "headers": GET + b"x-a: 0123456789\r\n" * ((n_bytes - 20) // 17) + b"\r\n",
        "url": b"GET /health?" + b"q" * (n_bytes - 40) + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    }
    head = heads[kind]

    async def play() -> None:
        config = Config(health, http=BoundedHttp, lifespan="off", log_level="error")
        config.load()
        one, wire = BoundedHttp(config, ServerState(), {}), Wire()
        one.connection_made(wire)
        step = -(-len(head) // reads)
        for begin in range(0, len(head), step):
            if not wire.closed:
                one.data_received(head[begin : begin + step])
        await asyncio.gather(*one.tasks)
        assert wire.written.startswith(b"HTTP/1.1 %d " % status) and wire.closed == (status == 431)
        one.connection_lost(None)

    asyncio.run(play())


def test_heads_of_one_connection_are_not_added_up() -> None:
    async def play() -> None:
        head = GET + b"X: " + b"x" * (MAX_HEAD_BYTES // 2) + b"\r\n\r\n"
        one, wire = await answered(head)
        for _ in range(3):
            one.data_received(head)
            await asyncio.gather(*one.tasks)
        assert wire.written.count(b"HTTP/1.1 200 ") == 4 and not wire.closed

    asyncio.run(play())
