"""Workers that fail, clients that leave: every request ends, and says where."""

import json
import socket
from pathlib import Path

import openai
import pytest

from common.ids import PeerId
from common.messages.requests import Cancel, Failed, Generate
from tests.gateway.cluster import Cluster, cluster
from tests.gateway.fake_worker import PATIENCE_S, tokens
from tests.gateway.model import NAME, ids


def begin(up: Cluster, body: dict[str, object]) -> socket.socket:
    """Send a request and leave its answer unread."""
    raw = json.dumps({"model": NAME, "prompt": "x", **body}).encode()
    host, port = up.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(raw)}\r\n\r\n"
    connection.sendall(head.encode() + raw)
    return connection


def read_until(connection: socket.socket, end: bytes) -> bytes:
    """Everything up to where `end` has come."""
    found = b""
    while end not in found:
        part = connection.recv(65536)
        assert part, found
        found += part
    return found


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_before_the_first_token_cancels_both_workers(up: Cluster, stream: bool) -> None:
    connection = begin(up, {"stream": stream})
    _, generate = up.accept()
    connection.close()
    assert up.cancelled() == {generate.request}


def test_a_client_that_leaves_in_the_middle_cancels_both_workers(up: Cluster) -> None:
    connection = begin(up, {"stream": True})
    gateway, generate = up.accept()
    up.decode.say(gateway, tokens(generate.request, 0, ids("a")))
    assert read_until(connection, b'"a"').startswith(b"HTTP/1.1 200")
    connection.close()
    assert up.cancelled() == {generate.request}


def test_a_token_after_the_cancel_is_answered_with_another(up: Cluster) -> None:
    connection = begin(up, {"stream": True})
    gateway, generate = up.accept()
    connection.close()
    assert up.cancelled() == {generate.request}
    up.decode.say(gateway, tokens(generate.request, 0, ids("late")))
    assert up.decode.hear(Cancel)[1].request == generate.request


@pytest.mark.system  # a second of waiting each: too long for `make check`
def test_the_death_of_the_decode_worker_names_the_phase_in_a_running_stream(redis_url: str, model: Path) -> None:
    with cluster(redis_url, model, silent_worker_ms=3000) as up:
        connection = begin(up, {"stream": True})
        gateway, generate = up.accept()
        up.decode.say(gateway, tokens(generate.request, 0, ids("ab")))
        assert read_until(connection, b'"ab"').startswith(b"HTTP/1.1 200")
        up.decode.silent = True
        rest = read_until(connection, b"0\r\n\r\n").decode()
        connection.close()
        assert "decode worker decode-0 died" in rest
        assert "in phase decode after 2 tokens" in rest
        assert '"code":"peer_failed"' in rest
        assert "[DONE]" not in rest
        assert up.prefill.hear(Cancel)[1].request == generate.request


def test_tokens_that_come_together_with_an_error_are_still_delivered(up: Cluster) -> None:
    connection = begin(up, {"stream": True})
    gateway, generate = up.accept()
    up.decode.say(gateway, tokens(generate.request, 0, ids("a")))
    read_until(connection, b'"a"')
    failed = Failed(request=generate.request, code="busy", phase="decode", text="", retryable=True)
    for message in (tokens(generate.request, 1, ids("b")), failed):
        up.decode.say(gateway, message)
    rest = read_until(connection, b"0\r\n\r\n").decode()
    connection.close()
    assert '"b"' in rest.partition('"error"')[0]
    assert up.prefill.hear(Cancel)[1].request == generate.request


def test_the_official_client_raises_the_error_of_a_broken_stream(up: Cluster) -> None:
    answer = up.in_background(lambda: list(up.client().completions.create(model=NAME, prompt="x", stream=True)))
    gateway, generate = up.accept()
    up.decode.say(gateway, tokens(generate.request, 0, ids("ab")))
    failed = Failed(request=generate.request, code="out_of_pages", phase="decode", text="no pages", retryable=True)
    up.decode.say(gateway, failed)
    with pytest.raises(
        openai.APIError, match="decode worker decode-0 gave up in phase decode after 2 tokens: no pages"
    ):
        answer.result(PATIENCE_S)
    assert up.prefill.hear(Cancel)[1].request == generate.request


@pytest.mark.system  # a second of waiting each: too long for `make check`
def test_the_death_of_the_prefill_worker_before_the_first_token_is_a_502(redis_url: str, model: Path) -> None:
    with cluster(redis_url, model, silent_worker_ms=3000) as up:
        answer = up.in_background(lambda: up.client().completions.create(model=NAME, prompt="x"))
        _, generate = up.accept()
        up.prefill.silent = True
        with pytest.raises(openai.APIStatusError, match="prefill worker prefill-0 died") as caught:
            answer.result(PATIENCE_S)
        assert caught.value.status_code == 502
        assert "in phase prefill before the first token" in caught.value.message
        assert up.decode.hear(Cancel)[1].request == generate.request


@pytest.mark.system  # a second of waiting each: too long for `make check`
def test_after_its_first_token_a_request_does_not_need_the_prefill_worker(redis_url: str, model: Path) -> None:
    with cluster(redis_url, model, silent_worker_ms=3000) as up:
        answer = up.in_background(lambda: up.client().completions.create(model=NAME, prompt="x"))
        gateway, generate = up.accept()
        up.decode.say(gateway, tokens(generate.request, 0, ids("a")))
        up.prefill.silent = True
        with up.http() as client:
            while client.get("/ready").status_code == 200:
                continue
        up.decode.say(gateway, tokens(generate.request, 1, ids("b"), "length"))
        assert answer.result(PATIENCE_S).choices[0].text == "ab"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("busy", 503),
        ("context_length_exceeded", 400),
        ("peer_failed", 502),
        ("deadline_exceeded", 504),
        ("?", 502),
    ],
)
def test_a_workers_refusal_keeps_its_code_and_gets_its_status(up: Cluster, code: str, status: int) -> None:
    answer = up.in_background(lambda: up.client().completions.create(model=NAME, prompt="x", stream=True))
    gateway, generate = up.accept()
    up.prefill.say(gateway, Failed(request=generate.request, code=code, phase="grant", text="no", retryable=False))
    with pytest.raises(openai.APIStatusError, match="prefill worker prefill-0 gave up in phase grant") as caught:
        answer.result(PATIENCE_S)
    assert (caught.value.status_code, caught.value.code) == (status, code)


def test_what_no_retry_can_make_fit_is_too_long_and_is_not_repeated(up: Cluster) -> None:
    """The official client repeats a 503 by itself."""
    answer = up.in_background(lambda: up.client().completions.create(model=NAME, prompt="x"))
    gateway, generate = up.accept()
    refusal = "it would need 90 pages; there are 80 in all"
    failed = Failed(request=generate.request, code="out_of_pages", phase="grant", text=refusal, retryable=False)
    up.prefill.say(gateway, failed)
    with pytest.raises(openai.BadRequestError, match=refusal) as caught:
        answer.result(PATIENCE_S)
    assert caught.value.code == "context_length_exceeded"
    assert up.decode.hear(Cancel)[1].request == generate.request


def test_the_deadline_is_a_504_that_names_the_phase(redis_url: str, model: Path) -> None:
    with cluster(redis_url, model, request_timeout_s=0.3) as up:
        with pytest.raises(openai.APIStatusError, match="in phase prefill before the first token") as caught:
            up.client().completions.create(model=NAME, prompt="x")
        assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
        assert up.accept()[1].timeout_ms == 300
        assert len(up.cancelled()) == 1


def test_one_failing_prompt_of_a_batch_ends_the_others(up: Cluster) -> None:
    answer = up.in_background(lambda: up.client().completions.create(model=NAME, prompt=["x", "y"]))
    gateway, first = up.accept()
    _, second = up.accept()
    up.prefill.say(
        gateway, Failed(request=first.request, code="busy", phase="prefill_queue", text="full", retryable=True)
    )
    with pytest.raises(openai.InternalServerError, match="full"):
        answer.result(PATIENCE_S)
    assert {up.decode.hear(Cancel)[1].request for _ in range(2)} == {first.request, second.request}
    assert up.prefill.hear(Cancel)[1].request == second.request


def test_running_requests_finish_when_the_gateway_is_told_to_stop(redis_url: str, model: Path) -> None:
    with cluster(redis_url, model, drain_s=PATIENCE_S) as up:
        answer = up.in_background(lambda: up.client().completions.create(model=NAME, prompt="x"))
        gateway, generate = up.accept()
        up.gateway.ask_to_stop()
        up.decode.say(gateway, tokens(generate.request, 0, ids("end"), "length"))
        assert answer.result(PATIENCE_S).choices[0].text == "end"
        up.stopped.wait(PATIENCE_S)


def test_what_cannot_finish_in_time_is_told_so_before_the_gateway_ends(redis_url: str, model: Path) -> None:
    with cluster(redis_url, model, drain_s=0.2) as up:
        answer = up.in_background(lambda: up.client().completions.create(model=NAME, prompt="x", stream=True))
        gateway, generate = up.accept()
        up.decode.say(gateway, tokens(generate.request, 0, ids("a")))
        stream = answer.result(PATIENCE_S)
        assert next(iter(stream)).choices[0].text == "a"
        up.gateway.ask_to_stop()
        with pytest.raises(openai.APIError, match=r"0\.2 s to drain are over"):
            list(stream)
        assert up.stopped.wait(PATIENCE_S)


def test_a_request_that_was_tried_again_tells_why_and_one_that_fails_how_often(redis_url: str, model: Path) -> None:
    with cluster(redis_url, model, attempts=2) as up, up.http() as client:
        body, headers = {"model": NAME, "prompt": "x"}, {"x-penstock-explain": "1"}
        answer = up.in_background(lambda: client.post("/v1/completions", json=body, headers=headers).json())
        gateway, first = up.accept()
        refuse(up, gateway, first)
        gateway, second = up.accept()
        up.decode.say(gateway, tokens(second.request, 0, ids("ab"), "length"))
        (told,) = answer.result(PATIENCE_S)["penstock"]["failed"]
        assert (told["code"], told["phase"], told["worker"]) == ("busy", "decode", "decode-0")
        answer = up.in_background(lambda: client.post("/v1/completions", json=body).json())
        for _ in range(2):
            gateway, generate = up.accept()
            refuse(up, gateway, generate)
        error = answer.result(PATIENCE_S)["error"]
        assert (error["code"], error["attempts"]) == ("busy", 2)


def refuse(up: Cluster, gateway: PeerId, generate: Generate) -> None:
    """The decode worker gives it up, and the prefill worker hears of that."""
    failed = Failed(request=generate.request, code="busy", phase="decode", text="no", retryable=True)
    up.decode.say(gateway, failed)
    assert up.prefill.hear(Cancel)[1].request == generate.request
