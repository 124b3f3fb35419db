"""Traces for OpenTelemetry (the extra `adaplex[otel]`): a span for each request that was admitted, with children for
its rows' time in the queue, in prefill and in decode.

Nothing is done while tokens come: a span is begun at submission and all else is made of the times that the answer kept
when it is over. Attributes: OpenTelemetry's conventions for generative AI, and `adaplex.*`; no text of prompts or
answers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from adaplex_adapters.errors import StartupError
from adaplex_server.request_scope import current_scope
from adaplex_server.service.series import WELL
from adaplex_server.service.trace import RowTimes
from adaplex_server.vocabulary import GenerateRequest

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span
    from opentelemetry.trace import Tracer as Spans


def otlp_tracer(endpoint: str) -> OtelTracer:
    """Sends spans in batches to a collector, by OTLP over HTTP. endpoint: such as http://localhost:4318/v1/traces.

    The SDK's own variables (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, ...) are obeyed. Raises
    StartupError where the extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise StartupError(
            f"traces need the extra: pip install 'adaplex[otel]' ({error})", param="otlp_endpoint"
        ) from error
    name = os.environ.get("OTEL_SERVICE_NAME", "adaplex")
    provider = TracerProvider(resource=Resource.create({"service.name": name, "service.version": version("adaplex")}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return OtelTracer(provider)


class OtelTracer:
    """Begins the spans. Owns the provider: `close` sends what is left."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._spans: Spans = provider.get_tracer("adaplex")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, request: GenerateRequest, began: float) -> OtelTrace:
        """A child of the client's span if it sent one; the request's scope gets the trace's id."""
        from opentelemetry.trace import SpanKind, format_trace_id

        scope = current_scope()
        parent = None
        if scope is not None and scope.traceparent:
            parent = self._propagator.extract({"traceparent": scope.traceparent, "tracestate": scope.tracestate})
        epoch = time.time_ns() - int(time.monotonic() * 1e9)
        span = self._spans.start_span(
            f"generate {request.model}",
            context=parent,
            kind=SpanKind.SERVER,
            start_time=epoch + int(began * 1e9),
            attributes=_asked(request),
        )
        if scope is not None:
            scope.trace_id = format_trace_id(span.get_span_context().trace_id)
        return OtelTrace(self._spans, span, epoch, began)

    def close(self) -> None:
        """Waits for the collector, some seconds at most."""
        self._provider.shutdown()


class OtelTrace:
    """The span of one request. epoch: Unix nanoseconds at monotonic 0. began: monotonic seconds."""

    def __init__(self, spans: Spans, span: Span, epoch: int, began: float) -> None:
        self._spans = spans
        self._span = span
        self._epoch = epoch
        self._began = began

    def end(self, outcome: str, rows: Sequence[RowTimes]) -> None:
        """Make the children, and end the span: with an error's status unless the answer is whole or not wanted."""
        from opentelemetry.trace import StatusCode

        now = time.monotonic()
        if self._span.is_recording():
            self._span.set_attribute("gen_ai.usage.output_tokens", sum(row.tokens for row in rows))
            self._span.set_attribute("gen_ai.response.finish_reasons", [outcome])
            for choice, row in enumerate(rows):
                self._children(choice, row, row.ended or now)
            if outcome not in WELL and outcome != "cancelled":
                self._span.set_attribute("error.type", outcome)
                self._span.set_status(StatusCode.ERROR, outcome)
        self._span.end(self._at(now))

    def _children(self, choice: int, row: RowTimes, ended: float) -> None:
        """One after the other; a phase that the row did not reach has none, the one in which it ended is cut."""
        placed, first = row.placed or row.first, row.first
        self._child("queue", choice, self._began, placed or ended)
        if placed:
            self._child("prefill", choice, placed, first or ended)
        if first:
            self._child("decode", choice, first, row.last, row.tokens)

    def _child(self, name: str, choice: int, begin: float, end: float, tokens: int | None = None) -> None:
        from opentelemetry.trace import set_span_in_context

        attributes = {"adaplex.choice": choice} | ({} if tokens is None else {"adaplex.tokens": tokens})
        context = set_span_in_context(self._span)
        child = self._spans.start_span(name, context=context, start_time=self._at(begin), attributes=attributes)
        child.end(self._at(max(begin, end)))

    def _at(self, seconds: float) -> int:
        return self._epoch + int(seconds * 1e9)


def _asked(request: GenerateRequest) -> dict[str, str | int | float]:
    return {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": request.model,
        "gen_ai.request.max_tokens": request.sampling.max_tokens,
        "gen_ai.request.temperature": request.sampling.temperature,
        "gen_ai.request.choice.count": request.n,
        "gen_ai.usage.input_tokens": len(request.prompt),
        "adaplex.request_id": request.request_id,
    }
