"""OpenTelemetry traces, where they are configured: one span a request, under the caller's own where it names one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upwell.errors import InputError
from upwell.server.record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider


def otlp_provider(endpoint: str) -> TracerProvider:
    """Spans sent to an OTLP collector. Raises InputError without the packages of the extra `otel`."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise InputError("traces need OpenTelemetry, which isn't installed", "pip install 'upwell[otel]'") from None
    provider = TracerProvider(resource=Resource.create({"service.name": "upwell"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


class Tracing:
    """Makes a span of each finished record. A RecordSink."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("upwell.server")
        self._parent = TraceContextTextMapPropagator()
        self._kind, self._error = SpanKind.SERVER, StatusCode.ERROR

    def __call__(self, record: RequestRecord) -> None:
        start = int(record.at * 1e9)
        context = self._parent.extract({"traceparent": record.traceparent}) if record.traceparent else None
        # Names are OpenTelemetry's conventions for HTTP and generative AI.
        attributes: dict[str, str | int] = {
            "http.request.method": record.method,
            "url.path": record.path,
            "http.response.status_code": record.status,
            "gen_ai.request.model": record.model or "",
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.output_tokens": record.completion_tokens,
            "upwell.request_id": record.id,
        }
        span = self._tracer.start_span(
            f"{record.method} {record.path}", context=context, kind=self._kind, attributes=attributes, start_time=start
        )
        if record.first_token is not None:
            span.add_event("first_token", timestamp=start + int((record.first_token - record.started) * 1e9))
        if record.status >= 500:
            span.set_status(self._error)
        span.end(end_time=start + int(record.latency * 1e9))

    def close(self) -> None:
        self._provider.shutdown()
