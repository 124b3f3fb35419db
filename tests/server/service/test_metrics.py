"""What a scrape says, and that no client can grow it."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from adaplex_adapters.errors import ModelNotFound
from adaplex_server.service.histogram import Histogram
from adaplex_server.service.metrics import Metrics
from adaplex_server.service.service import NO_STATS


def made(labels: int = 2) -> Metrics:
    return Metrics("base", labels, stats=lambda: NO_STATS, restarts=lambda: 1, registered=lambda: 5)


def samples(metrics: Metrics) -> dict[tuple[str, tuple[str, ...]], float]:
    body, media = metrics.exposition()
    assert media.startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            found[sample.name, tuple(sample.labels.values())] = sample.value
    return found


def test_label_is_capped_and_the_rest_is_counted_together() -> None:
    metrics = made(labels=2)
    for name in ("base", "a", "b", "c", "d", "a"):
        metrics.series(name).requests["stop"] += 1
    told = samples(metrics)
    counted = {key[1][0]: value for key, value in told.items() if key[0] == "adaplex_requests_total"}
    assert counted == {"base": 1, "a": 2, "b": 1, "other": 2}


def test_refused_names_are_no_labels() -> None:
    metrics = made()
    before = len(metrics.exposition()[0])
    for number in range(1000):
        metrics.refused(ModelNotFound(f"evil{number}"))
    told = samples(metrics)
    assert told["adaplex_requests_total", ("unknown", "model_not_found")] == 1000
    assert len(metrics.exposition()[0]) < 2 * before and b"evil" not in metrics.exposition()[0]


def test_histogram_is_prometheus_own() -> None:
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 1.0, 7.0):
        histogram.observe(value)
    assert histogram.buckets() == [("0.1", 2.0), ("1.0", 4.0), ("+Inf", 5.0)]
    assert histogram.sum == 8.65


def test_names_that_dashboards_read() -> None:
    metrics = made()
    metrics.series("a").first_token.observe(0.3)
    told = samples(metrics)
    assert told["adaplex_time_to_first_token_seconds_count", ("a",)] == 1
    assert told["vllm:num_requests_running", ("base",)] == 0
    assert told["adaplex_kv_pages_total", ()] == 0
    assert told["adaplex_engine_restarts_total", ()] == 1
    assert told["adaplex_adapters_registered", ()] == 5


def test_dashboards_in_deploy_ask_for_names_that_exist() -> None:
    """Every metric that a file in deploy/ names is one of ours."""
    told = {name for name, _ in samples(made())} | {"adaplex_requests_total"}
    import re

    for path in (Path(__file__).parents[3] / "deploy").rglob("*"):
        if path.is_file():
            for name in re.findall(r"\b(?:adaplex_[a-z_]+|vllm:[a-z_]+)", path.read_text(errors="replace")):
                assert name in told, f"{path.name} asks for {name}"
