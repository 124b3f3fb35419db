"""A request's span and its children, made by OpenTelemetry's own SDK from a service with a fake engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextvars import copy_context
from dataclasses import dataclass

import pytest

pytest.importorskip("opentelemetry.sdk", reason="pip install 'adaplex[otel]'")
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from adaplex_server.request_scope import RequestScope, open_scope
from adaplex_server.service.otel import OtelTracer, otlp_tracer
from adaplex_server.vocabulary import GenerateRequest, SamplingParams

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
REQUEST = GenerateRequest(request_id="r1", model="sql", prompt=(7777, 8888), sampling=SamplingParams(max_tokens=5), n=2)


@dataclass
class Times:
    placed: float = 0.0
    first: float = 0.0
    last: float = 0.0
    ended: float = 0.0
    tokens: int = 0


@dataclass
class Traced:
    tracer: OtelTracer
    exporter: InMemorySpanExporter

    def run(self, outcome: str, *rows: Times, parent: str = "") -> tuple[RequestScope, list[ReadableSpan]]:
        """All spans of one request that began two seconds ago."""

        def request() -> RequestScope:
            scope = open_scope("r1", parent)
            self.tracer.begin(REQUEST, time.monotonic() - 2).end(outcome, rows)
            return scope

        scope = copy_context().run(request)
        return scope, list(self.exporter.get_finished_spans())


@pytest.fixture
def traced() -> Iterator[Traced]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield Traced(OtelTracer(provider), exporter)
    provider.shutdown()


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None and span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_span_with_queue_prefill_and_decode(traced: Traced) -> None:
    now = time.monotonic()
    row = Times(now - 1.5, now - 1.0, now - 0.2, now - 0.1, 4)
    scope, spans = traced.run("stop", row)
    queue, prefill, decode, whole = spans
    assert [s.name for s in spans] == ["queue", "prefill", "decode", "generate sql"]
    durations = [seconds(span) for span in spans]
    assert durations == pytest.approx([0.5, 0.5, 0.8, 2.0], abs=0.05)
    assert all(s.parent is not None and s.parent.span_id == whole.context.span_id for s in (queue, prefill, decode))
    assert whole.attributes is not None and whole.attributes["gen_ai.usage.output_tokens"] == 4
    assert whole.status.is_ok or whole.status.status_code.name == "UNSET"
    assert abs((whole.end_time or 0) / 1e9 - time.time()) < 5
    assert scope.trace_id == f"{whole.context.trace_id:032x}"


def test_the_clients_trace_goes_on(traced: Traced) -> None:
    scope, spans = traced.run("length", parent=f"00-{TRACE}-{PARENT}-01")
    assert f"{spans[-1].context.trace_id:032x}" == TRACE == scope.trace_id
    assert spans[-1].parent is not None and f"{spans[-1].parent.span_id:016x}" == PARENT


def test_a_trace_that_is_not_sampled_costs_no_span(traced: Traced) -> None:
    _, spans = traced.run("stop", Times(1, 2, 3, 4, 5), parent=f"00-{TRACE}-{PARENT}-00")
    assert not spans


def test_choices_have_their_own_children_and_phases_may_be_missing(traced: Traced) -> None:
    now = time.monotonic()
    _, spans = traced.run("deadline_exceeded", Times(), Times(now - 1, 0, 0, now - 0.5))
    told = [(s.name, s.attributes["adaplex.choice"]) for s in spans[:-1] if s.attributes is not None]
    assert told == [("queue", 0), ("queue", 1), ("prefill", 1)]
    assert seconds(spans[2]) == pytest.approx(0.5, abs=0.05)
    assert spans[-1].status.description == "deadline_exceeded"


def test_no_words_of_anybody(traced: Traced) -> None:
    _, spans = traced.run("stop", Times(1, 2, 3, 4, 5))
    assert not any("7777" in str(span.attributes) for span in spans)


def test_an_exporter_is_made_for_a_collector() -> None:
    tracer = otlp_tracer("http://127.0.0.1:9/v1/traces")
    tracer.close()
