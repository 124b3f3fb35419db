"""The metrics that vLLM has, under its names, so that dashboards, autoscalers and gateways made for it work unchanged.

Names and meanings: vLLM's documentation of its production metrics. `vllm:lora_requests_info`: the model server protocol
of the Gateway API inference extension (its value is the time of the scrape, the newest sample counts). Two labels are
the same everywhere: model_name, the base's name, and engine, always "0".
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from adaplex_server.engine.messages import EngineStats
from adaplex_server.service.engine_figures import EngineFigures
from adaplex_server.service.exposition import Exposition
from adaplex_server.service.histogram import Histogram
from adaplex_server.service.series import RequestShapes, Series

FINISHED = {"stop": "stop", "length": "length", "cancelled": "abort"}
"""How a request ended, in vLLM's words; all else is "error"."""


@dataclass(frozen=True)
class EngineView:
    """The engine now. page_size: tokens. running, waiting: names of adapters with rows that have their first token, and
    with rows that have not.
    """

    stats: EngineStats
    page_size: int
    running: Collection[str]
    waiting: Collection[str]


def write_vllm_names(
    out: Exposition,
    base: str,
    view: EngineView,
    series: Sequence[Series],
    shapes: RequestShapes,
    figures: EngineFigures,
) -> None:
    """All of them; series: of all names, which are added up."""
    labels = {"model_name": base, "engine": "0"}
    _gauges(out, labels, view)
    _counters(out, labels, view.stats, series)
    for name, told, histogram in (
        ("time_to_first_token_seconds", "Time to first token.", Histogram.total(s.first_token for s in series)),
        ("inter_token_latency_seconds", "Between two tokens.", Histogram.total(s.between_tokens for s in series)),
        ("time_per_output_token_seconds", "Between two tokens.", Histogram.total(s.between_tokens for s in series)),
        ("request_time_per_output_token_seconds", "Mean of a row's times between tokens.", shapes.between),
        ("e2e_request_latency_seconds", "Whole requests.", Histogram.total(s.whole_request for s in series)),
        ("request_queue_time_seconds", "Before a row's place in a step.", Histogram.total(s.queue for s in series)),
        ("request_prefill_time_seconds", "From there to the first token.", shapes.prefill),
        ("request_decode_time_seconds", "From the first token to the last.", shapes.decode),
        ("request_prompt_tokens", "Tokens of a prompt.", shapes.prompt_tokens),
        ("request_generation_tokens", "Tokens of an answer.", shapes.answer_tokens),
        ("request_max_num_generation_tokens", "Tokens that an answer could have.", shapes.max_tokens),
        ("request_params_max_tokens", "Tokens that an answer could have.", shapes.max_tokens),
        ("request_params_n", "Answers that were asked for.", shapes.choices),
        ("iteration_tokens_total", "Tokens of a step.", figures.step_tokens),
    ):
        out.histogram(f"vllm:{name}", told, [(labels, histogram)])


def _gauges(out: Exposition, labels: dict[str, str], view: EngineView) -> None:
    stats = view.stats
    usage = stats.pages_used / stats.pages_total if stats.pages_total else 0.0
    for name, told, value in (
        ("num_requests_running", "Rows in the batch.", float(stats.running)),
        ("num_requests_waiting", "Rows in the queue.", float(stats.waiting)),
        ("kv_cache_usage_perc", "Share of the KV cache held by rows (0 to 1).", usage),
        ("gpu_cache_usage_perc", "The same under its older name.", usage),
    ):
        out.gauge(f"vllm:{name}", told, value, labels)
    cache = {"block_size": str(view.page_size), "num_gpu_blocks": str(stats.pages_total), "engine": labels["engine"]}
    out.gauge("vllm:cache_config_info", "Shape of the KV cache.", 1.0, cache)
    adapters = {
        "max_lora": str(stats.slots_total),
        "waiting_lora_adapters": ",".join(sorted(view.waiting)),
        "running_lora_adapters": ",".join(sorted(view.running)),
    }
    out.gauge("vllm:lora_requests_info", "Adapters of the rows in the engine; the time of this.", time.time(), adapters)


def _counters(out: Exposition, labels: dict[str, str], stats: EngineStats, series: Sequence[Series]) -> None:
    for name, told, value in (
        ("prompt_tokens", "Tokens of prompts.", sum(s.prompt_tokens for s in series)),
        ("generation_tokens", "Tokens generated.", sum(s.generated_tokens for s in series)),
        ("num_preemptions", "Rows that gave up their pages.", stats.preemptions),
        ("prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.prefix_query_tokens),
        ("prefix_cache_hits", "Tokens found in the prefix cache.", stats.prefix_hit_tokens),
        ("gpu_prefix_cache_queries", "The same under its older name.", stats.prefix_query_tokens),
        ("gpu_prefix_cache_hits", "The same under its older name.", stats.prefix_hit_tokens),
    ):
        out.counter(f"vllm:{name}_total", told, value, labels)
    ended: Counter[str] = Counter(dict.fromkeys(("stop", "length", "abort", "error"), 0))
    for one in series:
        for reason, count in one.requests.items():
            ended[FINISHED.get(reason, "error")] += count
    reasons = [({**labels, "finished_reason": reason}, count) for reason, count in ended.items()]
    out.family("counter", "vllm:request_success_total", "Requests that have ended, by how.", reasons)
