"""Spans of requests: what they say, where they go, and that nobody waits for them."""

import io
import json
import runpy
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import redirect_stderr
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from common.errors import PeerFailed
from common.log import Log
from common.messages.requests import Timings
from gateway import tracing as tracing_module
from gateway.account import Account
from gateway.metrics import GatewayMetrics, MetricsPage
from gateway.request_log import RequestLog, log_line
from gateway.tracing import tracing_from, tracing_to

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


def account(*, failed: bool = False) -> Account:
    made = Account("req-1", "/v1/chat/completions", 50.0, 10**18, traceparent=f"00-{TRACE}-{PARENT}-01")
    made.model, made.status, made.ended_ms = "m", 502 if failed else 200, 150.0
    made.timeline.sent(52.0, 53.0)
    if failed:
        made.failed(PeerFailed("gone").in_phase("transfer"))
        made.timeline.ended(150.0, Timings(compute_ms=20.0))
    else:
        made.timeline.first(Timings(compute_ms=30.0), 90.0)
        made.timeline.written(91.0)
    return made


def test_a_request_is_a_child_of_the_clients_span_and_its_parts_follow_one_another() -> None:
    exporter = InMemorySpanExporter()
    tracing = tracing_to(exporter, "gateway-0")
    tracing.ended(account())
    tracing.stop()
    *parts, whole = exporter.get_finished_spans()
    assert whole.parent is not None and f"{whole.parent.span_id:016x}" == PARENT
    assert f"{whole.context.trace_id:032x}" == TRACE
    assert [part.name for part in parts] == ["queue", "route", "compute", "wire", "reply"]
    assert all(part.parent is not None and part.parent.span_id == whole.context.span_id for part in parts)
    ends = [whole.start_time, *(part.end_time for part in parts)]
    assert [part.start_time for part in parts] == ends[:-1], "each begins where the one before it ends"
    assert ends[-1] == 10**18 + 41_000_000 and whole.end_time == 10**18 + 100_000_000


def test_a_failed_request_says_in_which_phase() -> None:
    exporter = InMemorySpanExporter()
    tracing = tracing_to(exporter, "gateway-0")
    tracing.ended(account(failed=True))
    tracing.stop()
    whole = exporter.get_finished_spans()[-1]
    assert whole.attributes is not None and not whole.status.is_ok
    assert (whole.attributes["error.type"], whole.attributes["penstock.phase"]) == ("peer_failed", "transfer")


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    got: list[tuple[str, bytes]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_collector_gets_spans_over_http_at_the_latest_when_the_gateway_stops(
    collector: tuple[str, list[tuple[str, bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, got = collector
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": url}
    monkeypatch.setenv(*next(iter(variables.items())))
    tracing = tracing_from(variables, Log(), "gateway-0")
    assert tracing is not None
    tracing.ended(account())
    tracing.stop()
    assert [path for path, _ in got] == ["/v1/traces"]
    assert b"gen_ai.operation.name" in got[0][1] and bytes.fromhex(TRACE) in got[0][1]


@pytest.mark.parametrize("variables", [{}, {"OTEL_TRACES_EXPORTER": "none"}, {"OTEL_SDK_DISABLED": "true"}])
def test_nothing_is_traced_unless_it_was_asked_for(variables: dict[str, str]) -> None:
    assert tracing_from(variables, Log(), "gateway-0") is None


def test_an_exporter_that_cannot_be_had_is_one_warning() -> None:
    with redirect_stderr(io.StringIO()) as told:
        assert tracing_from({"OTEL_TRACES_EXPORTER": "zipkin"}, Log(), "gateway-0") is None
    assert told.getvalue().count("tracing_off") == 1 and "penstock[otel]" in told.getvalue()


def test_a_sink_that_hangs_holds_nobody_up_and_what_does_not_fit_is_counted() -> None:
    entered, release = threading.Event(), threading.Event()

    def stuck(account: Account) -> None:
        entered.set()
        release.wait(20)

    log = RequestLog([stuck], Log())
    log.start()
    log.ended(account())
    assert entered.wait(20)
    for _ in range(10_001):
        log.ended(account())
    assert log.dropped_total == 1
    log._waiting.clear()
    release.set()
    log.stop()


def test_the_log_line_of_a_failed_request_has_its_phase_and_where_its_time_went() -> None:
    with redirect_stderr(io.StringIO()) as told:
        log_line(Log())(account(failed=True))
    line = json.loads(told.getvalue())
    assert (line["event"], line["phase"], line["retryable"]) == ("request", "transfer", True)
    assert (line["phases_ms"]["compute"], line["phases_ms"]["wire"]) == (20.0, 77.0)


def test_a_collector_that_never_answers_does_not_hold_the_end_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK itself waits ten seconds for an answer, and tries again."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{deaf.getsockname()[1]}"}
        monkeypatch.setenv(*next(iter(variables.items())))
        monkeypatch.setattr(tracing_module, "_LAST_WORDS_S", 0.1)
        tracing = tracing_from(variables, Log(), "gateway-0")
        assert tracing is not None
        tracing.ended(account())
        tracing.stop()
        assert any(thread.name == "last-spans" for thread in threading.enumerate()), "it was waited for"
        connection, _ = deaf.accept()
        connection.close()


def test_the_last_words_of_log_and_spans_take_two_seconds_each_at_most() -> None:
    assert 0 < tracing_module._LAST_WORDS_S <= 2


class Refusing(InMemorySpanExporter):
    """A collector that takes nothing, and only when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.let = threading.Event()

    def export(self, spans: object) -> SpanExportResult:
        self.let.wait(20)
        return SpanExportResult.FAILURE


def test_spans_that_nobody_got_are_counted_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six of each request: 85 requests fit into a queue of 512; what waits there is then refused."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")  # nothing leaves before it is full
    exporter = Refusing()
    tracing = tracing_to(exporter, "gateway-0", 512)
    metrics = GatewayMetrics()
    metrics.dropped["spans_dropped"] = lambda: tracing.dropped_total
    for _ in range(100):
        tracing.ended(account())
    unqueued = tracing.dropped_total
    assert unqueued == 15 * 6
    exporter.let.set()
    tracing.stop()
    assert tracing.dropped_total == 100 * 6
    page = MetricsPage(metrics, dict, dict, list).text()
    assert b"penstock_gateway_spans_dropped_total 600.0" in page


def test_without_the_sdk_one_line_says_what_to_install_and_nothing_else_happens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The module is loaded anew: nothing of it may need the SDK."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "opentelemetry"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    fresh = runpy.run_path(str(Path(tracing_module.__file__)))
    with redirect_stderr(io.StringIO()) as told:
        assert fresh["tracing_from"]({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, Log(), "gateway-0") is None
    (line,) = told.getvalue().splitlines()
    assert all(word in line for word in ("tracing_off", "opentelemetry", "install penstock[otel]"))


def test_a_sink_that_fails_ends_neither_itself_nor_the_others_and_says_so_once() -> None:
    got: list[str] = []

    def broken(account: Account) -> None:
        raise RuntimeError("exporter")

    with redirect_stderr(io.StringIO()) as told:
        log = RequestLog([broken, lambda account: got.append(account.request)], Log())
        for _ in range(3):
            log.ended(account())
        log.start()
        log.stop()
    assert got == ["req-1"] * 3 and log.dropped_total == 3
    assert told.getvalue().count('"event": "bug"') == 1 and "exporter" in told.getvalue()


@pytest.mark.parametrize("odd", ["\ud800", 2**70, object()])
def test_odd_values_do_not_end_the_thread_that_writes_log_lines(odd: object) -> None:
    one = account()
    one.workers = {"prefill": odd}  # type: ignore[dict-item]  # as odd as can be
    with redirect_stderr(io.StringIO()) as told:
        log_line(Log())(one)
    assert json.loads(told.getvalue())["request"] == "req-1"
