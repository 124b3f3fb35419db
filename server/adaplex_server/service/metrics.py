"""What Prometheus reads: `adaplex_*`, and the `vllm:` names that existing dashboards and autoscalers read.

Counts are plain numbers owned by the event loop; Prometheus's own types are made only when somebody scrapes. The
`adapter` label holds registered names alone: never what a client merely wrote, and at most `labels` different ones
(first used, first served; all others are counted together as "other", and those that a request put together as
"composition").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from adaplex_adapters.errors import AdaplexError
from adaplex_server.engine.messages import EngineStats
from adaplex_server.service.composed_name import is_composed
from adaplex_server.service.histogram import BETWEEN_TOKENS, FIRST_TOKEN, WHOLE_REQUEST, Histogram

OTHER = "other"
UNKNOWN = "unknown"
COMPOSITION = "composition"


class Series:
    """The numbers of one label value. Incremented directly by who counts."""

    __slots__ = (
        "between_tokens",
        "first_token",
        "generated_tokens",
        "label",
        "prompt_tokens",
        "requests",
        "whole_request",
    )

    def __init__(self, label: str) -> None:
        self.label = label
        self.requests: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.first_token = Histogram(FIRST_TOKEN)
        self.between_tokens = Histogram(BETWEEN_TOKENS)
        self.whole_request = Histogram(WHOLE_REQUEST)


def reason_of(error: BaseException) -> str:
    """The `reason` label of a request that ended in an error."""
    return error.code or "error" if isinstance(error, AdaplexError) else "internal_error"


class Metrics(Collector):
    """All metrics of a service.

    base: the base's name, which has a series of its own. labels: how many adapters have. stats: the engine's present
    figures, None while there is no engine. restarts: engines lost so far. registered: adapters that can be named.
    """

    def __init__(
        self,
        base: str,
        labels: int,
        *,
        stats: Callable[[], EngineStats | None],
        restarts: Callable[[], int],
        registered: Callable[[], int],
    ) -> None:
        self._base = base
        self._labels = labels
        self._stats = stats
        self._restarts = restarts
        self._registered = registered
        self._series = {base: Series(base)}
        self._shared = {label: Series(label) for label in (OTHER, UNKNOWN, COMPOSITION)}
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def series(self, name: str) -> Series:
        """Where requests of this registered name, or of a composition, are counted."""
        found = self._series.get(name)
        if found is None:
            if is_composed(name):
                return self._shared[COMPOSITION]
            if len(self._series) > self._labels:
                return self._shared[OTHER]
            found = self._series[name] = Series(name)
        return found

    def refused(self, error: BaseException) -> None:
        """Count a request that was refused before its name was known to be one of ours."""
        self._shared[UNKNOWN].requests[reason_of(error)] += 1

    def exposition(self) -> tuple[bytes, str]:
        """The body and the media type of a scrape."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: names cannot collide, this is the registry's only collector."""
        return ()

    def collect(self) -> Iterator[Metric]:
        series = [*self._series.values(), *(one for one in self._shared.values() if one.requests)]
        yield from _counters(series)
        yield _histogram(
            "adaplex_time_to_first_token_seconds", "From the request to its first token.", series, "first_token"
        )
        yield _histogram(
            "adaplex_inter_token_latency_seconds", "Between two tokens of a row.", series, "between_tokens"
        )
        yield _histogram("adaplex_request_seconds", "From the request to its end.", series, "whole_request")
        yield GaugeMetricFamily("adaplex_adapters_registered", "Names of adapters.", value=self._registered())
        yield CounterMetricFamily("adaplex_engine_restarts", "Engine processes that were lost.", value=self._restarts())
        stats = self._stats()
        yield GaugeMetricFamily("adaplex_engine_up", "1 while an engine is ready.", value=float(stats is not None))
        if stats is not None:
            yield from _engine(stats)
            yield from _vllm_names(stats, self._base)


def _counters(series: list[Series]) -> Iterator[Metric]:
    requests = CounterMetricFamily("adaplex_requests", "Requests by how they ended.", labels=("adapter", "reason"))
    prompt = CounterMetricFamily("adaplex_prompt_tokens", "Tokens of prompts admitted.", labels=("adapter",))
    generated = CounterMetricFamily("adaplex_generated_tokens", "Tokens generated.", labels=("adapter",))
    for one in series:
        for reason, count in one.requests.items():
            requests.add_metric((one.label, reason), count)
        prompt.add_metric((one.label,), one.prompt_tokens)
        generated.add_metric((one.label,), one.generated_tokens)
    yield from (requests, prompt, generated)


def _histogram(name: str, told: str, series: list[Series], field: str) -> Metric:
    family = HistogramMetricFamily(name, told, labels=("adapter",))
    for one in series:
        histogram: Histogram = getattr(one, field)
        family.add_metric((one.label,), histogram.buckets(), histogram.sum)
    return family


def _engine(stats: EngineStats) -> Iterator[Metric]:
    """Gauges, and totals that count since the engine started (a restart is a reset, which Prometheus knows)."""
    for name, told, count in (
        ("requests_waiting", "Rows in the queue.", stats.waiting),
        ("requests_running", "Rows in the batch.", stats.running),
        ("kv_pages_used", "Pages of the KV cache held by rows.", stats.pages_used),
        ("kv_pages_cached", "Pages held by the prefix cache alone.", stats.pages_cached),
        ("kv_pages_total", "Pages of the KV cache.", stats.pages_total),
        ("adapters_resident", "Adapters on the device.", stats.adapters_resident),
        ("adapter_rank_rows_used", "Device room for adapters that is taken, in ranks.", stats.rank_rows_used),
        ("adapter_rank_rows_total", "Device room for adapters, in ranks.", stats.rank_rows_total),
    ):
        yield GaugeMetricFamily(f"adaplex_{name}", told, value=count)
    for name, told, value in (
        ("adapter_loads", "Copies of adapters to the device.", stats.adapter_loads),
        ("adapter_evictions", "Adapters that made room for others.", stats.adapter_evictions),
        ("preemptions", "Rows that gave up their pages and were resumed.", stats.preemptions),
        ("prefix_hit_tokens", "Prompt tokens found in the prefix cache.", stats.prefix_hit_tokens),
        ("prefix_query_tokens", "Prompt tokens looked up in the prefix cache.", stats.prefix_query_tokens),
        ("engine_steps", "Steps of the engine.", stats.steps),
        ("engine_step_seconds", "Time spent in steps.", stats.step_seconds),
    ):
        yield CounterMetricFamily(f"adaplex_{name}", told, value=value)


def _vllm_names(stats: EngineStats, base: str) -> Iterator[Metric]:
    usage = stats.pages_used / stats.pages_total if stats.pages_total else 0.0
    for name, told, value in (
        ("vllm:num_requests_running", "Alias of adaplex_requests_running.", stats.running),
        ("vllm:num_requests_waiting", "Alias of adaplex_requests_waiting.", stats.waiting),
        ("vllm:kv_cache_usage_perc", "Share of KV pages held by rows (0 to 1).", usage),
    ):
        family = GaugeMetricFamily(name, told, labels=("model_name",))
        family.add_metric((base,), value)
        yield family
