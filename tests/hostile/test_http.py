"""Bytes that no decent client sends: an answer or an end of the connection, in time, and nothing is left behind."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import pytest

from tests.gateway.cluster import Cluster, cluster
from tests.gateway.model import NAME

_LIMIT_S = 10.0
GOOD = json.dumps({"model": NAME, "prompt": "ab", "max_tokens": 1}).encode()


@contextlib.contextmanager
def connection(up: Cluster) -> Iterator[socket.socket]:
    host, _, port = up.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=_LIMIT_S) as found:
        yield found


def read_all(sock: socket.socket, until: bytes = b"") -> bytes:
    """What comes until the end of the connection, or until this has."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(65536):
            got += piece
            if until and until in got:
                break
    return got


def post(body: bytes, *headers: str, path: str = "/v1/completions") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x00" * 64 + b"\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xff" * 100 + b"\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET \xff\xfe HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 400),
        (b"GET /%00%ff/../..//etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        (b"GET /health HTTP/1.1\r\nBad Header\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nx-a: " + b"a" * 2_000_000 + b"\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\n" + b"".join(b"x-%d: a\r\n" % i for i in range(200_000)) + b"\r\n", 431),
        (b"GET /health?" + b"q" * 3_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 7\r\n\r\nabcdefg", 400),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nConnection: close\r\nContent-Length: 9999999999\r\n\r\n", 413),
        (b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFF\r\nab", 400),
        (
            b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
            400,
        ),
    ],
    ids=list(map(str, range(17))),
)
def test_what_is_no_request_gets_an_answer_and_an_end(up: Cluster, sent: bytes, status: int) -> None:
    with connection(up) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(sent)
        answer = read_all(sock)
    # A reset may overtake the answer to what was not read to its end.
    assert answer.startswith(b"HTTP/1.1 %d " % status) or (answer == b"" and status == 431), answer[:200]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "JSON"),
        (b"\x00", "JSON"),
        (b"\xff\xfe{}", "JSON"),
        (b"[" * 200_000, "object"),
        (b'{"a":' * 100_000, "deep"),
        (b'{"model":"letters","prompt":"ab","x":' + b"[" * 5_000 + b"]" * 5_000 + b"}", "deep"),
        (b'{"model":"letters","prompt":"\\ud800"}', "JSON"),
        (b'{"model":"letters","prompt":"a\xc3"}', "UTF-8"),
        (b'{"model":"letters","prompt":1e999}', "prompt"),
        (b'{"model":"letters","prompt":"a","max_tokens":1e999}', "max_tokens"),
        (b'{"model":"letters","prompt":"a","temperature":NaN}', "JSON"),
        (b'{"model":"letters","prompt":"a","seed":' + b"9" * 10_000 + b"}", "seed"),
        (b'{"model":"letters","prompt":[[' + b"1," * 5_000 + b"1]]}", "tokens"),
        (b'{"model":"letters","prompt":["a",1]}', "prompt"),
        (b'{"model":"letters","model":7,"prompt":"a"}', "model"),
        (b'"a"', "object"),
        (b"null", "object"),
        (GOOD + b"\x00", "JSON"),
        (GOOD + GOOD, "JSON"),
    ],
    ids=list(map(str, range(19))),
)
def test_a_body_that_is_none_is_refused_by_its_field(up: Cluster, body: bytes, says: str) -> None:
    with connection(up) as sock:
        sock.sendall(post(body, "Content-Type: image/png"))
        head, _, answer = read_all(sock).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 "), head
    error = json.loads(answer)["error"]
    assert says in error["message"] or says == error["param"], error


def test_deep_values_for_a_template_are_refused(up: Cluster) -> None:
    deep = b"[" * 300 + b"]" * 300
    body = b'{"model":"letters","messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"raise_exception":3,"a":%b}}'
    up.answer((97,))
    with connection(up) as sock:
        sock.sendall(post(body % deep, path="/v1/chat/completions"))
        assert read_all(sock).startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 400 "))


def test_a_nul_and_any_character_are_text(up: Cluster) -> None:
    up.answer((97,))
    body = json.dumps({"model": NAME, "prompt": "\0\u202e\U0010ffff", "max_tokens": 1}).encode()
    with connection(up) as sock:
        sock.sendall(post(body, "Content-Type: text/plain; charset=\xff"))
        assert read_all(sock).startswith(b"HTTP/1.1 200 ")


def test_requests_sent_at_once_are_answered_in_their_order(up: Cluster) -> None:
    up.answer((97,))
    requests = b"".join(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nx-request-id: r%d\r\nContent-Length: %d\r\n%b\r\n%b"
        % (i, len(GOOD), b"Connection: close\r\n" if i == 19 else b"", GOOD)
        for i in range(20)
    )
    with connection(up) as sock:
        sock.sendall(requests)
        answers = read_all(sock)
    places = [answers.index(b'"cmpl-r%d"' % i) for i in range(20)]
    assert places == sorted(places) and answers.count(b"HTTP/1.1 200") == 20


def test_half_requests_and_clients_that_leave_hold_nothing(up: Cluster) -> None:
    request = post(GOOD)
    for length in range(0, len(request), 7):
        with connection(up) as sock:
            sock.sendall(request[:length])
    with connection(up) as sock:  # and whoever is decent is served as before
        up.answer((97,))
        sock.sendall(request)
        assert read_all(sock).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_trickles_in_keeps_nobody_waiting(up: Cluster) -> None:
    up.answer((97,))
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connection(up)) for _ in range(50)]
        for sock in slow:
            sock.sendall(post(GOOD)[:-5])
        with connection(up) as sock:
            sock.sendall(post(GOOD))
            assert read_all(sock).startswith(b"HTTP/1.1 200 ")
        for sock in slow:
            sock.sendall(post(GOOD)[-5:])
        assert all(read_all(sock).startswith(b"HTTP/1.1 200 ") for sock in slow)


def test_headers_that_never_end_are_given_up(up: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.http_protocol.HEAD_TIMEOUT_S", 0.1)
    with connection(up) as first, connection(up) as silent:
        first.sendall(b"GET /health HTTP/1.1\r\nx-a: ")
        assert read_all(first).startswith(b"HTTP/1.1 408 ")
        assert read_all(silent).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_never_ends_is_given_up(up: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.border.BODY_TIMEOUT_S", 0.1)
    with connection(up) as sock:
        sock.sendall(post(GOOD)[:-5])
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"body_too_slow" in answer


def test_a_body_without_a_length_ends_at_the_limit(up: Cluster) -> None:
    with connection(up) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(400):
                sock.sendall(b"20000\r\n" + b" " * 0x20000 + b"\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert read_all(sock, b"body_too_large").startswith(b"HTTP/1.1 413 ")


def test_a_flood_of_idle_connections_leaves_room_for_a_request(up: Cluster) -> None:
    up.answer((97,))
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connection(up))
        with connection(up) as sock:
            sock.sendall(post(GOOD))
            assert read_all(sock).startswith(b"HTTP/1.1 200 ")


@pytest.mark.long
def test_a_client_that_reads_nothing_is_let_go_at_its_deadline(redis_url: str, model: object) -> None:
    with cluster(redis_url, model, request_timeout_s=0.4) as one:  # type: ignore[arg-type]
        one.answer(tuple([97] * 200))
        body = json.dumps(
            {"model": NAME, "prompt": "ab", "max_tokens": 200, "n": 100, "stream": True, "logprobs": 0}
        ).encode()
        with connection(one) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            sock.sendall(post(body))
            deadline_s = time.monotonic() + _LIMIT_S
            with one.http() as client:
                while client.get("/status").json()["gateway"]["open_requests"]:
                    assert time.monotonic() < deadline_s, "still open"
