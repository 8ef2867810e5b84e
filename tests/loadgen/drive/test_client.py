import asyncio
import json
import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from common.errors import ConfigError
from loadgen.drive.bodies import OutgoingRequest
from loadgen.drive.client import Due, StreamingClient
from loadgen.drive.connection import Server, parse_server
from loadgen.drive.history import Answer as Heard
from loadgen.results.records import Outcome, RequestRecord
from tests.loadgen.fake_server import (
    DONE,
    Answer,
    FakeServer,
    Script,
    event,
    fake_server,
    steady,
    text_chunk,
    usage_chunk,
)

BODY = b'{"prompt":[1,2,3],"max_tokens":4}'


NOW = Due(0.0, 0.0)


def planned(index: int = 0, **changes: Any) -> OutgoingRequest:
    request = OutgoingRequest(
        index=index,
        conversation=index,
        turn=0,
        group="",
        request_id=f"r-{index}",
        session="",
        body=BODY,
        input_tokens=3,
        output_tokens=4,
    )
    return replace(request, **changes)


def exchange(
    script: Script, requests: Sequence[OutgoingRequest] = (planned(),), *, timeout_s: float = 30.0
) -> tuple[list[RequestRecord], FakeServer]:
    """Send requests one after the other."""

    async def talk() -> tuple[list[RequestRecord], FakeServer]:
        async with fake_server(script) as fake:
            client = StreamingClient(parse_server(fake.url), "/v1/completions", {"x-team": "a"}, timeout_s)
            records = [(await client.send(request, NOW))[0] for request in requests]
            client.close()
            return records, fake

    return asyncio.run(talk())


def answer(*pieces: bytes, **changes: object) -> RequestRecord:
    (record,), _ = exchange(lambda number, body: Answer(pieces, **changes))  # type: ignore[arg-type] # any field
    return record


def test_a_whole_stream_is_recorded_chunk_by_chunk() -> None:
    record = answer(text_chunk("a", [7]), text_chunk("b", [8]), usage_chunk(3, 2, cached=1), DONE)
    assert record.outcome is Outcome.OK
    assert (record.input_tokens, record.output_tokens, record.cached_tokens) == (3, 2, 1)
    assert (record.counted_by, record.http_status, record.detail) == ("usage", 200, "")
    assert list(record.chunk_tokens or ()) == [1, 1]
    assert record.sent_s < record.chunk_s[0] <= record.chunk_s[1] <= record.end_s


def test_the_request_carries_its_id_and_the_headers_that_were_given() -> None:
    _, fake = exchange(steady())
    (seen,) = fake.seen
    assert seen.path == "/v1/completions"
    assert (seen.headers["x-request-id"], seen.headers["x-team"]) == ("r-0", "a")
    assert seen.body["prompt"] == [1, 2, 3]


def test_role_and_finish_chunks_without_tokens_are_no_tokens() -> None:
    role = event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    content = event({"choices": [{"delta": {"content": "hi"}}]})
    finish = event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    record = answer(role, content, finish, DONE)
    assert len(record.chunk_s) == 1
    assert (record.output_tokens, record.counted_by, record.finish_reason) == (1, "chunks", "stop")


def test_a_token_without_text_is_a_token() -> None:
    record = answer(text_chunk("", [7]), text_chunk("b", [8]), DONE)
    assert (len(record.chunk_s), record.output_tokens, record.counted_by) == (2, 2, "token_ids")


def test_chunks_of_several_tokens_keep_their_counts() -> None:
    record = answer(text_chunk("ab", [7, 8]), text_chunk("cde", [9, 10, 11]), usage_chunk(3, 5), DONE)
    assert list(record.chunk_tokens or ()) == [2, 3]
    assert len(record.token_gaps_s()) == 3


def test_without_token_ids_the_usage_counts_and_chunks_stay_unknown() -> None:
    record = answer(text_chunk("ab"), text_chunk("cde"), usage_chunk(3, 5), DONE)
    assert (record.output_tokens, record.counted_by, record.chunk_tokens) == (5, "usage", None)


def test_events_cut_anywhere_give_the_same_tokens() -> None:
    stream = text_chunk("a", [7]) + text_chunk("b", [8]) + DONE
    record = answer(*(stream[place : place + 1] for place in range(len(stream))))
    assert (record.outcome, record.output_tokens) == (Outcome.OK, 2)


def test_an_error_status_is_recorded_with_what_it_says() -> None:
    body = b'{"error": {"message": "max_tokens is negative", "code": "x"}}'
    record = answer(body, status=400, content_type="application/json")
    assert (record.outcome, record.http_status) == (Outcome.HTTP_ERROR, 400)
    assert record.detail == "HTTP 400: max_tokens is negative"


@pytest.mark.parametrize("status", [429, 503])
def test_a_full_server_is_a_class_of_its_own(status: int) -> None:
    assert answer(b"busy", status=status, content_type="text/plain").outcome is Outcome.REJECTED


def test_an_error_inside_the_stream_is_recorded_with_what_it_says() -> None:
    record = answer(text_chunk("a", [7]), event({"error": {"message": "decode worker died"}}), DONE)
    assert (record.outcome, record.detail) == (Outcome.SERVER_ERROR, "decode worker died")


def test_a_connection_that_breaks_is_a_cut_stream() -> None:
    record = answer(text_chunk("a", [7]), ending="cut")
    assert record.outcome is Outcome.CUT
    assert "after 1 chunks" in record.detail
    assert len(record.chunk_s) == 1


def test_a_stream_without_done_is_a_cut_stream() -> None:
    assert answer(text_chunk("a", [7])).outcome is Outcome.CUT


def test_a_stream_without_tokens_is_empty() -> None:
    assert answer(usage_chunk(3, 0), DONE).outcome is Outcome.EMPTY


@pytest.mark.parametrize("piece", [b"data: {oops\n\n", b'data: {"choices": 3}\n\n'])
def test_a_chunk_that_is_none_is_a_bad_stream(piece: bytes) -> None:
    record = answer(piece, DONE)
    assert record.outcome is Outcome.BAD_STREAM
    assert "unreadable" in record.detail


def test_thinking_counts_as_text_under_both_of_its_names() -> None:
    chunks = [event({"choices": [{"delta": {name: "hm"}}]}) for name in ("reasoning", "reasoning_content", "content")]
    record = answer(*chunks, DONE)
    assert (record.outcome, record.output_tokens, len(record.chunk_s)) == (Outcome.OK, 3, 3)


@pytest.mark.parametrize(("token_ids", "counted_by"), [([7], "token_ids"), (None, "chunks")])
def test_a_usage_that_leaves_the_answer_out_counts_nothing(token_ids: list[int] | None, counted_by: str) -> None:
    usage = event({"choices": [], "usage": {"prompt_tokens": 3}})
    record = answer(text_chunk("a", token_ids), text_chunk("b", token_ids), usage, DONE)
    assert (record.input_tokens, record.output_tokens, record.counted_by) == (3, 2, counted_by)


@pytest.mark.parametrize(
    "absurd",
    [usage_chunk(3, -1), usage_chunk(3, 10**30), event({"choices": [], "penstock": {"phases_ms": {"compute": 1e300}}})],
)
def test_absurd_numbers_are_a_bad_stream(absurd: bytes) -> None:
    """A result that holds them would not be read back."""
    record = answer(text_chunk("a", [7]), absurd, DONE)
    assert (record.outcome, record.output_tokens) == (Outcome.BAD_STREAM, 1)


@pytest.mark.parametrize("status", [200, 400])
def test_what_a_server_says_reaches_no_terminal_as_a_command(status: int) -> None:
    body = json.dumps({"error": {"message": "\x1b[31mRED\nline2\x07"}}).encode()
    record = answer(b"data: " + body + b"\n\n" if status == 200 else body, status=status)
    assert record.detail.endswith("\\x1b[31mRED line2\\x07")


def test_an_answer_that_is_no_stream_is_a_bad_stream() -> None:
    record = answer(b"{}", content_type="application/json")
    assert record.outcome is Outcome.BAD_STREAM
    assert "application/json" in record.detail


def test_a_request_that_hangs_is_given_up_and_its_connection_closed() -> None:
    async def talk() -> RequestRecord:
        async with fake_server(lambda number, body: Answer((text_chunk("a", [7]),), ending="hang")) as fake:
            client = StreamingClient(parse_server(fake.url), "/v1/completions", {}, 0.2)
            record, _ = await client.send(planned(), NOW)
            await asyncio.wait_for(fake.seen[0].left.wait(), 30)
            return record

    record = asyncio.run(talk())
    assert (record.outcome, record.detail) == (Outcome.TIMEOUT, "not done after 0.2 s")


@pytest.mark.parametrize("after_tokens", [0, 1, 2])
def test_a_cancelled_request_leaves_the_server_at_its_point(after_tokens: int) -> None:
    async def talk() -> RequestRecord:
        async with fake_server(lambda number, body: Answer((text_chunk("a", [7]),) * 2, ending="hang")) as fake:
            client = StreamingClient(parse_server(fake.url), "/v1/completions", {}, 30)
            record, _ = await client.send(planned(cancel_after_tokens=after_tokens), NOW)
            if after_tokens > 0:  # at 0 the server may never have read the request
                await asyncio.wait_for(fake.seen[0].left.wait(), 30)
            return record

    record = asyncio.run(talk())
    assert record.outcome is Outcome.CANCELLED
    assert record.output_tokens == after_tokens


def test_no_server_is_a_connect_failure() -> None:
    async def talk() -> RequestRecord:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))  # bound and not listening: every connection is refused
            client = StreamingClient(Server("127.0.0.1", unused.getsockname()[1], False, ""), "/v1", {}, 5)
            return (await client.send(planned(), NOW))[0]

    assert asyncio.run(talk()).outcome is Outcome.CONNECT


def test_requests_in_turn_share_one_connection_and_a_failed_one_is_not_used_again() -> None:
    requests = [planned(index) for index in range(4)]
    _, fake = exchange(steady(), requests)
    assert fake.connections == 1

    def broken(number: int, body: dict[str, Any]) -> Answer:
        return Answer((b"data: {oops\n\n",), ending="hang") if number == 1 else steady()(number, body)

    records, fake = exchange(broken, requests)
    assert [record.outcome.value for record in records] == ["ok", "bad_stream", "ok", "ok"]
    assert fake.connections == 2


def heard(keeps_answer: bool, *pieces: bytes) -> Heard | None:
    async def talk() -> Heard | None:
        async with fake_server(lambda number, body: Answer(pieces)) as fake:
            client = StreamingClient(parse_server(fake.url), "/v1/completions", {}, 30)
            return (await client.send(planned(keeps_answer=keeps_answer), NOW))[1]

    return asyncio.run(talk())


def test_an_answer_is_kept_whole_if_it_is_needed() -> None:
    pieces = (text_chunk("a", [7]), text_chunk("bc", [8, 9]), DONE)
    assert heard(True, *pieces) == Heard("abc", (7, 8, 9), 3)
    assert heard(False, *pieces) is None
    assert heard(True, text_chunk("a"), text_chunk("b"), usage_chunk(3, 5), DONE) == Heard("ab", None, 5)


def test_an_answer_that_broke_is_none() -> None:
    assert heard(True, text_chunk("a", [7])) is None


def test_what_the_server_says_of_phases_and_workers_is_recorded() -> None:
    account = event({"choices": [], "penstock": {"phases_ms": {"compute": 4.5}, "workers": {"decode": "d-0"}}})
    record = answer(text_chunk("a", [7]), account, DONE)
    assert (record.phases_ms, record.workers) == ({"compute": 4.5}, {"decode": "d-0"})


def test_a_session_is_told_where_there_is_one() -> None:
    _, fake = exchange(steady(), [planned(session="s-1"), planned(1), planned(2, session="a\r\nb: €")])
    assert [seen.headers.get("x-session-id") for seen in fake.seen] == ["s-1", None, "a%0D%0Ab%3A%20%E2%82%AC"]


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("http://h:8000", Server("h", 8000, False, "")),
        ("http://h", Server("h", 80, False, "")),
        ("https://h/v1/", Server("h", 443, True, "")),
        ("http://[::1]:9/llm/v1", Server("::1", 9, False, "/llm")),
    ],
)
def test_a_url_names_a_server_with_or_without_v1(url: str, server: Server) -> None:
    assert parse_server(url) == server


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h:8000",
        "ftp://h",
        "http://",
        "http://h:x",
        "http://h:0",
        "http://h:99999",
        "http://[::1",
        "http://a..b:80",
        f"http://{'a' * 70}.com",
        "http://h/\N{EURO SIGN}",
        "http://h\N{EURO SIGN}/",
        "http://h/o k",
        "http://h/\r\nx: y",
        "http://h/?key=1",
        "http://h/#part",
    ],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        parse_server(url)


@pytest.mark.parametrize("url", ["http://me:{}@h", "http://{}@h:80/v1", "http://me:{}/x@h", "http://[{}@h", "me:{}@h"])
def test_a_secret_in_the_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="--api-key or --header") as refused:
        parse_server(url.format("hunter2"))
    assert "hunter2" not in str(refused.value)


def test_names_of_containers_and_a_dot_at_the_end_are_hosts() -> None:
    assert parse_server("http://my_gateway-0.:8000").host == "my_gateway-0."
