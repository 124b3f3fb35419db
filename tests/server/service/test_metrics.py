"""What a scrape says, and that no client can grow it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from prometheus_client.parser import text_string_to_metric_families

from adaplex_adapters.errors import ModelNotFound
from adaplex_server.engine.messages import AdapterMoved, EngineInfo, EngineStats, StepFigures
from adaplex_server.service.engine_figures import EngineFigures
from adaplex_server.service.metrics import Metrics, RowInFlight, Sources
from adaplex_server.service.training.figures import TrainingFigures, running_job

STATS = EngineStats(2, 3, 40, 10, 64, 5, 80, 512, 7, 1, 4, 30, 90, 11, 0.5, slots_total=8, host_adapter_bytes=4096)
INFO = EngineInfo(1, "cuda:0", "bfloat16", "nf4", 2048, 64, 256, 16, 64, 10**9, 1000)


def made(labels: int = 2, rows: Sequence[RowInFlight] = (), figures: EngineFigures | None = None) -> Metrics:
    sources = Sources(
        stats=lambda: STATS,
        info=lambda: INFO,
        restarts=lambda: 1,
        registered=lambda: 5,
        ready=lambda: True,
        rows=lambda: rows,
    )
    return Metrics("base", labels, figures or EngineFigures(), sources)


def samples(metrics: Metrics, training: TrainingFigures | None = None) -> dict[tuple[str, tuple[str, ...]], float]:
    """By name and label values; a sample that is there twice is an error of the format."""
    body, media = metrics.exposition(training)
    assert media.startswith("text/plain")
    found: dict[tuple[str, tuple[str, ...]], float] = {}
    families = set()
    for family in text_string_to_metric_families(body.decode()):
        assert family.name not in families and family.documentation and family.type != "unknown", family.name
        families.add(family.name)
        for sample in family.samples:
            key = (sample.name, tuple(sample.labels.values()))
            assert key not in found, f"{key} is told twice"
            found[key] = sample.value
    return found


def test_label_is_capped_and_the_rest_is_counted_together() -> None:
    metrics = made(labels=2)
    for name in ("base", "a", "b", "c", "d", "a", "a*0.5+b"):
        metrics.series(name).ended("stop")
    told = samples(metrics)
    counted = {key[1][0]: value for key, value in told.items() if key[0] == "adaplex_requests_total"}
    assert counted == {"base": 1, "a": 2, "b": 1, "other": 2, "composition": 1}


def test_refused_names_are_no_labels() -> None:
    metrics = made()
    before = len(metrics.exposition()[0])
    for number in range(1000):
        metrics.refused(ModelNotFound(f"evil{number}"))
    told = samples(metrics)
    assert told["adaplex_requests_total", ("unknown", "model_not_found")] == 1000
    assert told["adaplex_request_errors_total", ("unknown", "model_not_found")] == 1000
    assert len(metrics.exposition()[0]) < 2 * before and b"evil" not in metrics.exposition()[0]


def test_a_scrape_of_a_thousand_adapters_is_small() -> None:
    metrics = made(labels=100)
    for number in range(1000):
        series = metrics.series(f"adapter-{number:04d}")
        series.ended("stop")
        for histogram in (series.queue, series.first_token, series.between_tokens, series.whole_request):
            histogram.observe(0.1)
    body = metrics.exposition()[0]
    assert len(body) < 1_000_000 and body.count(b"\n") < 10_000


def test_a_refusal_counts_for_the_name_when_it_is_one_of_ours() -> None:
    metrics = made()
    metrics.refused(ModelNotFound("gone"), "a")
    assert samples(metrics)["adaplex_request_errors_total", ("a", "model_not_found")] == 1


def test_what_is_told_of_an_adapter() -> None:
    metrics = made()
    series = metrics.series("a")
    series.queue.observe(0.02)
    series.first_token.observe(0.3)
    series.cached_tokens += 16
    series.ended("cancelled")
    told = samples(metrics)
    for name in ("queue_seconds", "time_to_first_token_seconds"):
        assert told[f"adaplex_{name}_count", ("a",)] == 1
    assert told["adaplex_cached_prompt_tokens_total", ("a",)] == 16
    assert told["adaplex_requests_total", ("a", "cancelled")] == 1
    assert not any(name == "adaplex_request_errors_total" and labels[0] == "a" for name, labels in told)
    assert told["adaplex_request_errors_total", ("base", "overloaded")] == 0


def test_what_is_told_of_the_engine() -> None:
    figures = EngineFigures()
    figures.on_step(StepFigures(0.003, 4, 0, 4, 2, 1))
    figures.on_step(StepFigures(0.030, 5, 5, 600, 3, 0))
    figures.on_step(StepFigures(0.020, 5, 1, 100, 3, 1))
    figures.on_moved(AdapterMoved("r", "copy", 0.002))
    told = samples(made(figures=figures))
    for phase in ("decode", "prefill", "mixed"):
        assert told["adaplex_step_seconds_count", (phase,)] == 1
    assert told["adaplex_step_seconds_sum", ("mixed",)] == 0.020
    assert told["adaplex_step_prefill_rows_total", ()] == 6 and told["adaplex_step_decode_rows_total", ()] == 8
    assert told["adaplex_step_base_rows_total", ()] == 2
    assert told["adaplex_step_tokens_sum", ()] == 704 and told["adaplex_step_adapters_sum", ()] == 8
    assert told["adaplex_adapter_swap_seconds_count", ("copy",)] == 1
    assert told["adaplex_adapter_swap_seconds_count", ("read",)] == 0
    assert told["adaplex_kv_pages_capacity", ()] == 64 and told["adaplex_adapter_slots_capacity", ()] == 8
    assert told["adaplex_engine_restarts_total", ()] == 1 and told["adaplex_adapters_registered", ()] == 5


def test_rows_by_kind() -> None:
    rows = [RowInFlight("a", "lora", True), RowInFlight("b", "dora", False), RowInFlight("base", "base", True)]
    told = samples(made(rows=rows))
    assert {key[1][0]: value for key, value in told.items() if key[0] == "adaplex_rows"} == {
        "base": 1,
        "lora": 1,
        "dora": 1,
    }


def test_training_jobs_by_state() -> None:
    running = running_job("mine", {"step": 12, "loss": 0.25, "tokens": 4000})
    told = samples(made(), TrainingFigures({"running": 1, "failed": 2}, (running,)))
    assert told["adaplex_training_jobs", ("running",)] == 1 and told["adaplex_training_jobs", ("queued",)] == 0
    assert told["adaplex_training_loss", ("mine",)] == 0.25 and told["adaplex_training_step", ("mine",)] == 12
    assert not any(name == "adaplex_training_seconds_left" for name, _ in told)


def test_names_follow_the_conventions() -> None:
    """Base units in the names, _total for counters and for nothing else; ours have no colon."""
    body = made().exposition(TrainingFigures({}, ()))[0].decode()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", body, re.M):
        if not name.startswith("vllm:"):
            assert re.fullmatch(r"[a-z_]+", name) and name.endswith("_total") == (kind == "counter"), name
        assert not re.search(r"_(ms|millis|kb|mb|percent|minutes)(_|$)", name), name
