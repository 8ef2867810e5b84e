"""OpenTelemetry spans of requests, built from their accounts when they are over: nothing is added to a token's way.

On where OpenTelemetry's own variables name an exporter (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or
OTEL_TRACES_EXPORTER) and its SDK is installed (`penstock[otel]`); the SDK reads all others (OTEL_SERVICE_NAME,
OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_BSP_..., headers, timeouts) by itself. Names follow the conventions for
HTTP servers and generative AI; what is ours begins with `penstock.`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any  # Any: span attributes

from common.log import Log
from gateway.account import ROUTES, Account

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider  # optional: `otel`
    from opentelemetry.sdk.trace.export import SpanExporter  # optional: `otel`

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_FLUSH_MS = 3_000


class Tracing:
    """Owns the provider. `ended` is called in the request log's thread, never on the event loop."""

    def __init__(self, provider: "TracerProvider") -> None:
        # The SDK is optional: whoever makes this has it.
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # optional: `otel`

        self._provider = provider
        self._tracer = provider.get_tracer("penstock.gateway")
        self._parent = TraceContextTextMapPropagator()

    def ended(self, account: Account) -> None:
        """One span for the request, and one for each part of the time to its first token."""
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
            span.set_status(Status(StatusCode.ERROR, str(account.error)))
        within, at_ns = set_span_in_context(span), start_ns
        for part, took_ms in account.timeline.parts_ms().items():
            end_ns = at_ns + round(took_ms * 1e6)
            if took_ms > 0:
                self._tracer.start_span(part, within, start_time=at_ns).end(end_ns)
            at_ns = end_ns
        span.end(start_ns + round((account.ended_ms - account.arrived_ms) * 1e6))

    def stop(self) -> None:
        """Send what is left, for a moment; then drop it."""
        self._provider.force_flush(_FLUSH_MS)
        self._provider.shutdown()


def tracing_from(environ: Mapping[str, str], log: Log, gateway: str) -> Tracing | None:
    """What OpenTelemetry's variables ask for; None if nothing, or if it cannot be had, which the log then says."""
    kind = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    named = kind or ("otlp" if any(environ.get(name) for name in _ENDPOINTS) else "none")
    if named == "none" or environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    try:
        return tracing_to(_exporter(named, environ), gateway)
    except (ImportError, ValueError) as error:
        log.event("tracing_off", exporter=named, text=f"no spans are sent: {error}; install penstock[otel]")
        return None


def tracing_to(exporter: "SpanExporter", gateway: str) -> Tracing:
    """Spans go to `exporter`, in batches, in a thread of the SDK. Raises ImportError without it."""
    from opentelemetry.sdk.resources import Resource  # optional: `otel`
    from opentelemetry.sdk.trace import TracerProvider  # optional: `otel`
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # optional: `otel`

    ours = Resource.create({"service.instance.id": gateway})
    if str(ours.attributes.get("service.name", "")).startswith("unknown_service"):
        ours = ours.merge(Resource({"service.name": "penstock-gateway"}))
    provider = TracerProvider(resource=ours, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)


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
