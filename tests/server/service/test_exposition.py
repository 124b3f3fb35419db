"""The text that is written is what Prometheus's own parser reads back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from adaplex_server.service.exposition import Exposition
from adaplex_server.service.histogram import Histogram

LABEL = st.text(st.characters(exclude_categories=("Cs",)), max_size=12).filter(lambda text: "\r" not in text)


@given(LABEL, st.floats(allow_nan=False))
def test_labels_and_values_come_back(label: str, value: float) -> None:
    out = Exposition()
    out.gauge("a_seconds", "Told.", value, {"name": label, "more": "x"})
    out.counter("b_total", "Told.", 3)
    first, second = text_string_to_metric_families(out.body().decode().replace("\x85", " ").replace("\u2028", " "))
    assert first.samples[0].labels["more"] == "x" and first.samples[0].value == value
    assert second.samples[0].value == 3 and second.type == "counter"


@given(st.lists(st.floats(0, 2)))
def test_histogram_is_prometheus_own(values: list[float]) -> None:
    histogram = Histogram((0.1, 1.0))
    for value in values:
        histogram.observe(value)
    out = Exposition()
    out.histogram("h_seconds", "Told.", [({"adapter": "a"}, histogram), ({"adapter": "b"}, Histogram((0.5,)))])
    out.histogram("g_seconds", "Told.", [({}, histogram)])
    labelled, alone = text_string_to_metric_families(out.body().decode())
    told = {s.labels["le"]: s.value for s in labelled.samples if "le" in s.labels and s.labels["adapter"] == "a"}
    assert told == {
        "0.1": sum(v <= 0.1 for v in values),
        "1.0": sum(v <= 1.0 for v in values),
        "+Inf": len(values),
    }
    assert [s.value for s in alone.samples if s.name == "g_seconds_sum"] == [histogram.sum]
    assert [s.value for s in alone.samples if s.name == "g_seconds_count"] == [len(values)]


def test_a_total_has_what_its_parts_have() -> None:
    parts = [Histogram((1.0, 2.0)) for _ in range(3)]
    for number, part in enumerate(parts):
        part.observe(number + 0.5)
    total = Histogram.total(parts)
    assert total.cumulative() == [1, 2, 3] and total.sum == 4.5 and parts[0].cumulative() == [1, 1, 1]
