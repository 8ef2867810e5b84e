"""Answers byte for byte, as no well-behaved server sends them."""

import asyncio
import time
from collections.abc import Sequence

import pytest

from loadgen.drive.bodies import OutgoingRequest
from loadgen.drive.client import Due, StreamingClient
from loadgen.drive.connection import ConnectionPool, parse_server
from loadgen.drive.whole import WholeAnswer
from loadgen.results.records import Outcome, RequestRecord
from loadgen.server.api import NoAnswer, ServerApi
from tests.loadgen.fake_server import DONE, text_chunk

BODY = text_chunk("a", [7]) + DONE


def stream(body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def listening(answers: Sequence[bytes], *, stays: bool) -> asyncio.Future[asyncio.Server]:
    """A server that gives one answer after the other on each connection, and then closes it unless it `stays`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
        if stays:
            await reader.read()
        writer.close()

    return asyncio.ensure_future(asyncio.start_server(serve, "127.0.0.1", 0))


def exchange(*answers: bytes, stays: bool = True) -> list[RequestRecord]:
    """As many requests as there are answers, one after the other."""

    async def talk() -> list[RequestRecord]:
        async with await listening(answers, stays=stays) as server:
            host, port = server.sockets[0].getsockname()
            client = StreamingClient(parse_server(f"http://{host}:{port}"), "/v1/completions", {}, 10)
            records = [(await client.send(planned(index), Due(0.0, 0.0)))[0] for index in range(len(answers))]
            client.close()
            return records

    return asyncio.run(talk())


def planned(index: int) -> OutgoingRequest:
    return OutgoingRequest(
        index=index,
        conversation=index,
        turn=0,
        group="",
        request_id=f"r-{index}",
        session="",
        body=b"",
        input_tokens=3,
        output_tokens=1,
    )


@pytest.mark.parametrize("interim", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"])
def test_an_interim_answer_is_not_the_answer(interim: bytes) -> None:
    records = exchange(interim + interim + stream(BODY), stream(BODY))
    assert [(record.outcome, record.http_status, record.output_tokens) for record in records] == [
        (Outcome.OK, 200, 1),
        (Outcome.OK, 200, 1),
    ]


def test_headers_of_an_interim_answer_are_not_those_of_the_answer() -> None:
    plain = stream(BODY).replace(b"content-type: text/event-stream\r\n", b"")
    (record,) = exchange(b"HTTP/1.1 103 Early Hints\r\ncontent-type: text/event-stream\r\n\r\n" + plain)
    assert record.outcome is Outcome.BAD_STREAM


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nzzzz",
        b"HTTP/1.1 101 Switching\r\n\r\n",
        b"\x00\x01garbage\r\n\r\n",
        stream(b"garbage without an event"),
        stream(b"<html>\n\n</html>\n\n"),
        stream(b'{"choices": []}\n\n'),
        stream(b'data: {"error":' + b"[" * 100_000 + b"\n\n"),
    ],
)
def test_what_is_no_stream_of_events_is_a_bad_stream(answer: bytes) -> None:
    (record,) = exchange(answer)
    assert record.outcome is Outcome.BAD_STREAM
    assert record.detail.isprintable() and record.detail


def test_garbage_before_a_connection_breaks_is_a_bad_stream() -> None:
    (record,) = exchange(stream(b"garbage").replace(b"content-length: 7", b"content-length: 70"), stays=False)
    assert (record.outcome, record.detail) == (Outcome.BAD_STREAM, "not an event stream: garbage")


@pytest.mark.parametrize(
    "body", [b"", b": still here\n\n", b"data: {", b"dat", b"event: x\n\n", BODY[:-14] + b"oops\n\n"]
)
def test_an_event_stream_that_ends_early_is_cut(body: bytes) -> None:
    (record,) = exchange(stream(body))
    assert record.outcome is Outcome.CUT


def test_an_error_answer_nested_too_deep_is_told_as_it_came() -> None:
    deep = b'{"error":' + b"[" * 60_000
    (record,) = exchange(stream(deep).replace(b"200 OK", b"500 Oops"))
    assert record.outcome is Outcome.HTTP_ERROR
    assert record.detail.startswith('HTTP 500: {"error":[[[')


def test_a_page_that_upgrades_is_no_page() -> None:
    async def talk() -> None:
        answer = b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"
        async with await listening([answer], stays=True) as server:
            host, port = server.sockets[0].getsockname()
            async with ServerApi(f"http://{host}:{port}", {}) as api:
                await api.get("/status")

    with pytest.raises(NoAnswer, match="another protocol"):
        asyncio.run(talk())


def test_a_chunk_nested_too_deep_is_an_unreadable_chunk() -> None:
    (record,) = exchange(stream(b'data: {"error":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n\n"))
    assert record.detail.startswith("unreadable chunk: ")


class FailingAtItsEnd(WholeAnswer):
    def on_end(self) -> None:
        raise RecursionError("too deep")


def test_a_sink_that_fails_at_the_end_is_not_left_waiting() -> None:
    async def talk() -> None:
        async with await listening([stream(BODY)], stays=True) as server:
            host, port = server.sockets[0].getsockname()
            pool = ConnectionPool(parse_server(f"http://{host}:{port}"), time.monotonic)
            sink = FailingAtItsEnd(asyncio.get_running_loop().create_future())
            (await pool.take()).begin(b"GET / HTTP/1.1\r\n\r\n", sink)
            await asyncio.wait_for(sink.done, 10)

    with pytest.raises(ConnectionError, match="too deep"):
        asyncio.run(talk())
