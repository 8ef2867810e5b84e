"""OpenTelemetry spans of requests, built from their accounts when they are over: nothing is added to a token's way.

On where OpenTelemetry's own variables name an exporter (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or
OTEL_TRACES_EXPORTER) and its SDK is installed (`penstock[otel]`); the SDK reads all others (OTEL_SERVICE_NAME,
OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_BSP_..., headers, timeouts) by itself. Names follow the conventions for
HTTP servers and generative AI; what is ours begins with `penstock.`.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any  # Any: span attributes

from common.log import Log
from gateway.account import ROUTES, Account

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider  # optional: `otel`
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult  # optional: `otel`

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_LAST_WORDS_S = 1.5
_MOST_WAITING = 2_048  # the SDK's own default


class Export:
    """What the SDK's thread gives its batches to: counts them on their way to an exporter."""

    def __init__(self, exporter: "SpanExporter") -> None:
        self._exporter, self._is_down = exporter, False
        self.taken_total = self.lost_total = 0
        """Spans that left the queue, and those of them that nobody got."""

    def export(self, spans: "Sequence[ReadableSpan]") -> "SpanExportResult":
        """One batch."""
        self.taken_total += len(spans)
        arrived = False
        try:
            result = self._exporter.export(spans)
            arrived = result.value == 0
        finally:
            self.lost_total += 0 if arrived else len(spans)
        return result

    def shutdown(self) -> None:
        """No more will come. Told twice, it is no matter."""
        if not self._is_down:
            self._is_down = True
            self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Exporters send at once."""
        return self._exporter.force_flush(timeout_millis)


class Tracing:
    """Owns the provider. `ended` is called in the request log's thread, never on the event loop."""

    def __init__(self, provider: "TracerProvider", export: Export, most_waiting: int) -> None:
        # The SDK is optional: whoever makes this has it.
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # optional: `otel`

        self._provider, self._export, self._most_waiting = provider, export, most_waiting
        self._made_total = self._unqueued_total = 0
        self._tracer = provider.get_tracer("penstock.gateway")
        self._parent = TraceContextTextMapPropagator()

    def ended(self, account: Account) -> None:
        """One span for the request, and one for each part of the time to its first token; none if the queue is full."""
        parts_ms = account.timeline.parts_ms()
        n_spans = 1 + sum(took_ms > 0 for took_ms in parts_ms.values())
        if self._made_total - self._export.taken_total + n_spans > self._most_waiting:
            self._unqueued_total += n_spans
            return
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context  # optional: `otel`

        carrier = {"traceparent": account.traceparent or "", "tracestate": account.tracestate or ""}
        start_ns = account.arrived_unix_ns
        operation = ROUTES[account.path]
        span = self._tracer.start_span(
            f"{operation} {account.model}".rstrip(),
            self._parent.extract(carrier),
            SpanKind.SERVER,
            attributes=_attributes(account, operation),
            start_time=start_ns,
        )
        if account.error is not None:
            span.set_status(Status(StatusCode.ERROR, account.error.text))
        within, at_ns = set_span_in_context(span), start_ns
        self._made_total += n_spans if span.is_recording() else 0
        for part, took_ms in parts_ms.items():
            end_ns = at_ns + round(took_ms * 1e6)
            if took_ms > 0:
                self._tracer.start_span(part, within, start_time=at_ns).end(end_ns)
            at_ns = end_ns
        span.end(start_ns + round((account.ended_ms - account.arrived_ms) * 1e6))

    @property
    def dropped_total(self) -> int:
        """Spans that nobody got: the queue was full, or the collector did not take them."""
        return self._unqueued_total + self._export.lost_total

    def stop(self) -> None:
        """Send what is left, for a moment; then drop it. The SDK itself waits as long as its exporter does."""
        last = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        last.start()
        last.join(_LAST_WORDS_S)
        self._export.shutdown()  # or it would try again and again


def tracing_from(environ: Mapping[str, str], log: Log, gateway: str) -> Tracing | None:
    """What OpenTelemetry's variables ask for; None if nothing, or if it cannot be had, which the log then says."""
    kind = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    named = kind or ("otlp" if any(environ.get(name) for name in _ENDPOINTS) else "none")
    if named == "none" or environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    try:
        asked = environ.get("OTEL_BSP_MAX_QUEUE_SIZE", "").strip()
        most_waiting = int(asked) if asked.isdecimal() and int(asked) else _MOST_WAITING
        return tracing_to(_exporter(named, environ), gateway, most_waiting)
    except (ImportError, ValueError) as error:
        log.event("tracing_off", exporter=named, text=f"no spans are sent: {error}; install penstock[otel]")
        return None


def tracing_to(exporter: "SpanExporter", gateway: str, most_waiting: int = _MOST_WAITING) -> Tracing:
    """Spans go to `exporter`, in batches, in a thread of the SDK. Raises ImportError without it, and ValueError for fewer
    spans that may wait than one batch has.
    """
    from opentelemetry.sdk.resources import Resource  # optional: `otel`
    from opentelemetry.sdk.trace import TracerProvider  # optional: `otel`
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # optional: `otel`

    ours = Resource.create({"service.instance.id": gateway})
    if str(ours.attributes.get("service.name", "")).startswith("unknown_service"):
        ours = ours.merge(Resource({"service.name": "penstock-gateway"}))
    provider = TracerProvider(resource=ours, shutdown_on_exit=False)
    export = Export(exporter)
    # It calls these methods and no others; its base class cannot be named without the SDK.
    provider.add_span_processor(BatchSpanProcessor(export, max_queue_size=most_waiting))  # type: ignore[arg-type]
    return Tracing(provider, export, most_waiting)


def _exporter(named: str, environ: Mapping[str, str]) -> "SpanExporter":
    """Raises ImportError, and ValueError for one that we do not know."""
    if named == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter  # optional: `otel`

        return ConsoleSpanExporter()
    protocols = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next((environ[name] for name in protocols if environ.get(name)), "http/protobuf")
    if named != "otlp" or protocol != "http/protobuf":
        raise ValueError(f"exporter {named} with protocol {protocol} is not known here; otlp with http/protobuf is")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # optional: `otel`

    return OTLPSpanExporter()


def _attributes(account: Account, operation: str) -> dict[str, Any]:
    timeline = account.timeline
    found: dict[str, Any] = {
        "http.request.method": "POST",
        "http.route": account.path,
        "url.path": account.path,
        "http.response.status_code": account.status,
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "penstock",
        "gen_ai.request.model": account.model,
        "gen_ai.usage.input_tokens": account.prompt_tokens,
        "gen_ai.usage.output_tokens": account.generated_tokens,
        "penstock.request": account.request,
        "penstock.cached_tokens": account.cached_tokens,
        "penstock.attempts": timeline.attempts,
        **{f"penstock.worker.{role}": worker for role, worker in account.workers.items()},
    }
    if account.finish is not None:
        found["gen_ai.response.finish_reasons"] = [account.finish]
    if timeline.ttft_ms is not None:
        found["penstock.ttft_ms"] = timeline.ttft_ms
    if account.error is not None:
        found["error.type"] = account.error.code
        found["penstock.phase"] = account.error.phase or "unknown"
    return found
