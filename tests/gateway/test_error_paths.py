"""Every error of ours, as a client of /v1 meets it: code, phase and retryable are in the body, and in the request's log line."""

import asyncio
import io
import json
from contextlib import redirect_stderr
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from common import errors
from common.clock import MonotonicClock
from common.errors import ServingError
from common.log import Log
from common.messages.requests import Failed
from gateway import errors as gateway_errors
from gateway.account import Account
from gateway.api_keys import read_api_keys
from gateway.border import Border, Watch
from gateway.core.failure import WorkerFailed
from gateway.metrics import GatewayMetrics
from gateway.request_log import RequestLog

WORKERS = {"ask": ("kv_corrupt", "transfer", True), "no": ("invalid_request", "prefill_queue", False)}


def kinds(base: type[ServingError]) -> list[type[ServingError]]:
    return [base, *(kind for below in base.__subclasses__() for kind in kinds(below))]


def made(kind: type[ServingError]) -> ServingError:
    if kind is errors.ContextTooLong:
        return errors.ContextTooLong(prompt_tokens=1, output_tokens=2, limit_tokens=2)
    return kind("what was wrong")


OURS = [kind for kind in kinds(ServingError) if kind.__module__ in (errors.__name__, gateway_errors.__name__)]
RETRYABLE = {"busy", "out_of_pages", "out_of_chunks", "no_worker", "rate_limit_exceeded", "peer_failed", "load_failed"}
RETRYABLE |= {"kv_corrupt", "stuck", "protocol_violation"}


def asked(raised: Exception, *, path: str = "/v1/completions", key: str = "") -> tuple[int, dict[str, Any], Account]:
    """Status, error and account of a request that ends so."""
    ended: list[Account] = []
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise raised

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(message: Message) -> None:
        sent.append(message)

    requests = RequestLog([ended.append], Log())
    keys = read_api_keys("sesame" if key else None, None, None, open_admin=True)
    border = Border(app, Watch(GatewayMetrics(), Log(), requests, MonotonicClock()), keys)
    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    with redirect_stderr(io.StringIO()):
        asyncio.run(border(scope, receive, send))
    requests._pass_on()
    (account,) = ended or (Account("", "", 0.0, 0),)
    return sent[0]["status"], json.loads(sent[1]["body"])["error"], account


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.code)
def test_every_error_has_its_code_a_phase_and_whether_to_try_again(kind: type[ServingError]) -> None:
    status, error, account = asked(made(kind))
    assert status == kind.http_status
    assert (error["code"], error["phase"], error["retryable"]) == (kind.code, "queue", kind.code in RETRYABLE)
    told = account.fields()
    assert (told["error"], told["phase"], told["retryable"]) == (kind.code, "queue", kind.code in RETRYABLE)


@pytest.mark.parametrize("phase", ["route", "prefill_queue", "prefill", "grant", "transfer", "decode", "retry"])
def test_a_phase_that_is_known_is_kept(phase: str) -> None:
    _, error, account = asked(errors.PeerFailed("gone").in_phase(phase))
    assert error["phase"] == account.fields()["phase"] == phase


@pytest.mark.parametrize(("code", "phase", "retryable"), WORKERS.values())
def test_what_a_worker_says_of_its_failure_is_what_the_client_hears(code: str, phase: str, retryable: bool) -> None:
    failed = Failed(request="r", code=code, phase=phase, text="", retryable=retryable)  # type: ignore[arg-type]
    _, error, _ = asked(WorkerFailed(failed, text="no"))
    assert (error["code"], error["phase"], error["retryable"]) == (code, phase, retryable)


def test_a_bug_of_ours_has_a_phase_too_and_is_not_to_be_tried_again() -> None:
    status, error, account = asked(ZeroDivisionError())
    assert (status, error["code"], error["phase"], error["retryable"]) == (500, "internal", "gateway", False)
    assert account.fields()["phase"] == "gateway"


def test_a_wrong_key_has_a_phase() -> None:
    status, error, _ = asked(AssertionError("nobody without a key gets here"), key="sesame")
    assert (status, error["phase"], error["retryable"]) == (401, "queue", False)


def test_what_is_no_request_for_an_answer_has_no_phase() -> None:
    _, error, _ = asked(gateway_errors.NotFound("no"), path="/v1/nothing")
    assert "phase" not in error
