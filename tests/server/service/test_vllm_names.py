"""What others read under vLLM's names: its own dashboard, the Gateway API's endpoint picker, autoscalers."""

from __future__ import annotations

import time

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from adaplex_server.service.engine_figures import EngineFigures
from adaplex_server.service.exposition import Exposition
from adaplex_server.service.series import RequestShapes, Series
from adaplex_server.service.service import NO_STATS
from adaplex_server.service.vllm_names import EngineView, write_vllm_names

# Samples that vLLM's Grafana dashboard asks for, each with the labels model_name and engine.
DASHBOARD = [
    "e2e_request_latency_seconds_bucket",
    "e2e_request_latency_seconds_count",
    "e2e_request_latency_seconds_sum",
    "generation_tokens_total",
    "inter_token_latency_seconds_bucket",
    "kv_cache_usage_perc",
    "num_requests_running",
    "num_requests_waiting",
    "prompt_tokens_total",
    "request_decode_time_seconds_sum",
    "request_generation_tokens_bucket",
    "request_max_num_generation_tokens_sum",
    "request_prefill_time_seconds_sum",
    "request_prompt_tokens_bucket",
    "request_queue_time_seconds_sum",
    "request_success_total",
    "time_to_first_token_seconds_bucket",
    "request_time_per_output_token_seconds_bucket",
    "time_per_output_token_seconds_bucket",
    "gpu_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "iteration_tokens_total_bucket",
    "request_params_n_bucket",
    "request_params_max_tokens_bucket",
]


def families(view: EngineView, series: list[Series], shapes: RequestShapes) -> dict[str, Metric]:
    out = Exposition()
    write_vllm_names(out, "base", view, series, shapes, EngineFigures())
    return {family.name: family for family in text_string_to_metric_families(out.body().decode())}


@pytest.fixture
def told() -> dict[str, Metric]:
    shapes = RequestShapes()
    series = [Series("base", shapes), Series("a", shapes)]
    for one in series:
        one.first_token.observe(0.2)
        one.prompt_tokens += 10
    series[0].ended("stop")
    series[1].ended("overloaded")
    series[1].ended("cancelled")
    return families(EngineView(NO_STATS, 16, {"sql", "dates"}, {"itn"}), series, shapes)


def test_every_name_of_the_dashboard(told: dict[str, Metric]) -> None:
    found = {
        sample.name.removeprefix("vllm:")
        for family in told.values()
        for sample in family.samples
        if sample.labels.get("model_name") == "base" and sample.labels.get("engine") == "0"
    }
    assert not set(DASHBOARD) - found


def test_names_are_added_up(told: dict[str, Metric]) -> None:
    (prompt,) = told["vllm:prompt_tokens"].samples
    counts = [s.value for s in told["vllm:time_to_first_token_seconds"].samples if s.name.endswith("_count")]
    assert prompt.value == 20 and counts == [2]


def test_how_requests_ended(told: dict[str, Metric]) -> None:
    ended = {s.labels["finished_reason"]: s.value for s in told["vllm:request_success"].samples}
    assert ended == {"stop": 1, "length": 0, "abort": 1, "error": 1}


def test_adapters_as_the_endpoint_picker_wants_them(told: dict[str, Metric]) -> None:
    """One sample, labels with names between commas, the value a time: the newest counts."""
    (info,) = told["vllm:lora_requests_info"].samples
    assert info.labels == {
        "max_lora": "0",
        "running_lora_adapters": "dates,sql",
        "waiting_lora_adapters": "itn",
    }
    assert abs(info.value - time.time()) < 60
    (cache,) = told["vllm:cache_config_info"].samples
    assert cache.labels["block_size"] == "16" and cache.value == 1
