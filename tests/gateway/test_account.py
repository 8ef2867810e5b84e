"""What is kept of a request until its log line is written is small, whatever its client sends."""

import pytest

from common.clock import MonotonicClock
from common.errors import InvalidRequest
from common.ids import RequestId, WorkerId
from common.log import Log
from common.messages.requests import Failed, Timings
from gateway.account import Account, trace_context
from gateway.api_keys import read_api_keys
from gateway.border import Border, Watch
from gateway.core.failure import WorkerFailed
from gateway.core.open_request import FailedAttempt
from gateway.errors import error_body
from gateway.explain import served_fields
from gateway.metrics import GatewayMetrics
from gateway.request_log import RequestLog
from tests.gateway.cluster import Cluster

PARENT = f"00-{'a' * 32}-{'b' * 16}-01"


def account() -> Account:
    return Account("r", "/v1/completions", 0.0, 0)


def test_an_error_leaves_a_short_text_and_no_frames() -> None:
    one = account()
    one.failed(InvalidRequest("x" * 4_000_000))
    assert one.error is not None and len(one.error.text) == 200
    assert not isinstance(one.error, BaseException)


def test_an_error_body_is_short_whatever_it_quotes() -> None:
    assert len(error_body(InvalidRequest("x" * 4_000_000))) < 1_200


@pytest.mark.parametrize("parent", ["zz", PARENT + "0", PARENT.upper(), "00-" + "a" * 60_000, ""])
def test_what_is_no_traceparent_is_not_kept_nor_its_state(parent: str) -> None:
    assert trace_context({"traceparent": parent, "tracestate": "a=b"}) == (None, None)


@pytest.mark.parametrize(("state", "kept"), [("a=b", "a=b"), ("a" * 512, "a" * 512), ("a" * 513, None), ("", None)])
def test_a_tracestate_is_kept_up_to_512_characters(state: str, kept: str | None) -> None:
    assert trace_context({"traceparent": PARENT, "tracestate": state}) == (PARENT, kept)


@pytest.mark.parametrize(("choice", "kept"), [(0, True), (3, False), (None, False)])
def test_only_the_first_choices_worker_tells_where_the_first_choices_time_went(choice: int | None, kept: bool) -> None:
    told = Timings(compute_ms=5.0)
    failed = Failed(request=RequestId("r.3"), code="stuck", phase="prefill", text="no", retryable=True, timings=told)
    one = account()
    one.failed(WorkerFailed(failed, text="no"), choice)
    assert one.failed_timings == (told if kept else None)


def test_attempts_that_failed_are_told_in_the_log_and_to_clients_that_ask() -> None:
    one = account()
    assert "failed" not in one.fields() and "failed" not in served_fields(one)
    one.failed_attempts = (FailedAttempt("peer_failed", "decode", WorkerId("decode-0"), 12.3456),)
    told = [{"code": "peer_failed", "phase": "decode", "worker": "decode-0", "ms": 12.346}]
    assert one.fields()["failed"] == served_fields(one)["failed"] == told


def test_the_border_keeps_no_more_of_a_header_than_that() -> None:
    watch = Watch(GatewayMetrics(), Log(), RequestLog([], Log()), MonotonicClock())
    border = Border(lambda *_: None, watch, read_api_keys(None, None, None, open_admin=True))  # type: ignore[arg-type]
    headers = [(b"traceparent", b"00-" + b"a" * 60_000), (b"tracestate", b"a" * 60_000)]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    kept = border._account(scope, "r")
    assert kept is not None and (kept.traceparent, kept.tracestate) == (None, None)


def test_the_name_of_an_unknown_model_comes_back_short(up: Cluster) -> None:
    with up.http() as client:
        answer = client.post("/v1/completions", json={"model": "m" * 4_000_000, "prompt": "a"})
    assert answer.status_code == 404 and len(answer.content) < 1_000
    assert "mmm..." in answer.json()["error"]["message"]
