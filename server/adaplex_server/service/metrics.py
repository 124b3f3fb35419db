"""What Prometheus reads of a service: `adaplex_*` here, and the names that others know in `vllm_names`.

Counts are plain numbers owned by the event loop; text is made of them only when somebody scrapes. The `adapter` label
holds registered names alone: never what a client merely wrote, and at most `labels` different ones (first used, first
served; all others are counted together as "other", and those that a request put together as "composition").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import psutil
from prometheus_client import ProcessCollector

from adaplex_server.engine.messages import EngineInfo, EngineStats
from adaplex_server.service.composed_name import is_composed
from adaplex_server.service.engine_figures import EngineFigures
from adaplex_server.service.exposition import MEDIA_TYPE, Exposition
from adaplex_server.service.series import OURS, RequestShapes, Series, reason_of
from adaplex_server.service.training.figures import STATUSES, TrainingFigures
from adaplex_server.service.vllm_names import EngineView, write_vllm_names

OTHER = "other"
UNKNOWN = "unknown"
COMPOSITION = "composition"


@dataclass(frozen=True)
class RowInFlight:
    """A row that is in the engine. kind: of its adapter, or "base". begun: it has its first token."""

    model: str
    kind: str
    begun: bool


@dataclass(frozen=True)
class Sources:
    """What is asked at every scrape. stats, info: of the present engine, None while there is none. restarts: engines
    lost so far. registered: adapters that can be named. ready: whether requests are taken.
    """

    stats: Callable[[], EngineStats | None]
    info: Callable[[], EngineInfo | None]
    restarts: Callable[[], int]
    registered: Callable[[], int]
    ready: Callable[[], bool]
    rows: Callable[[], Collection[RowInFlight]]


class Metrics:
    """All metrics of a service. base: its name, which has a series of its own. labels: how many adapters have."""

    def __init__(self, base: str, labels: int, figures: EngineFigures, sources: Sources) -> None:
        self._base = base
        self._labels = labels
        self._figures = figures
        self._sources = sources
        self._shapes = RequestShapes()
        self._series = {base: Series(base, self._shapes)}
        self._series[base].errors.update(dict.fromkeys(OURS, 0))
        self._shared = {label: Series(label, self._shapes) for label in (OTHER, UNKNOWN, COMPOSITION)}
        self._process = ProcessCollector(registry=None)

    def series(self, name: str) -> Series:
        """Where requests of this registered name, or of a composition, are counted."""
        found = self._series.get(name)
        if found is None:
            if is_composed(name):
                return self._shared[COMPOSITION]
            if len(self._series) > self._labels:
                return self._shared[OTHER]
            found = self._series[name] = Series(name, self._shapes)
        return found

    def refused(self, error: BaseException, known: str | None = None) -> None:
        """Count a request that was refused. known: the name that it gave, if that is one of ours."""
        (self._shared[UNKNOWN] if known is None else self.series(known)).ended(reason_of(error))

    def exposition(self, training: TrainingFigures | None = None) -> tuple[bytes, str]:
        """The body and the media type of a scrape. training: None where there is nothing to tell of jobs."""
        out = Exposition()
        series = [*self._series.values(), *(one for one in self._shared.values() if one.requests)]
        rows, stats, info = self._sources.rows(), self._sources.stats(), self._sources.info()
        _requests(out, series)
        _shapes(out, self._shapes)
        _rows(out, rows)
        _steps(out, self._figures)
        out.gauge("adaplex_adapters_registered", "Adapters that can be named.", self._sources.registered())
        out.gauge("adaplex_ready", "1 while new requests are taken.", self._sources.ready())
        out.counter("adaplex_engine_restarts_total", "Engine processes that were lost.", self._sources.restarts())
        out.gauge("adaplex_engine_up", "1 while an engine is ready.", stats is not None)
        if stats is not None and info is not None:
            _engine(out, stats, info)
            view = EngineView(stats, info.page_size, {r.model for r in rows if _adapted(r) and r.begun}, {
                r.model for r in rows if _adapted(r) and not r.begun
            })  # fmt: skip
            write_vllm_names(out, self._base, view, series, self._shapes, self._figures)
        if training is not None:
            _training(out, training)
        for family in self._process.collect():
            kind: Literal["counter", "gauge"] = "counter" if family.type == "counter" else "gauge"
            out.family(kind, family.samples[0].name, family.documentation, [({}, s.value) for s in family.samples])
        return out.body(), MEDIA_TYPE


def _adapted(row: RowInFlight) -> bool:
    return row.kind != "base"


def _requests(out: Exposition, series: Sequence[Series]) -> None:
    adapter = [{"adapter": one.label} for one in series]
    ended = [({"adapter": s.label, "reason": reason}, n) for s in series for reason, n in s.requests.items()]
    errors = [({"adapter": s.label, "error": error}, n) for s in series for error, n in s.errors.items()]
    out.family("counter", "adaplex_requests_total", "Requests by how they ended.", ended)
    out.family("counter", "adaplex_request_errors_total", "Requests that ended in an error, by its code.", errors)
    for name, told, counts in (
        ("prompt_tokens", "Tokens of prompts admitted.", [s.prompt_tokens for s in series]),
        ("cached_prompt_tokens", "Tokens of prompts that the prefix cache held.", [s.cached_tokens for s in series]),
        ("generated_tokens", "Tokens generated.", [s.generated_tokens for s in series]),
    ):
        out.family("counter", f"adaplex_{name}_total", told, zip(adapter, counts, strict=True))
    for name, told, histograms in (
        ("queue_seconds", "From a row's submission to its place in a step.", [s.queue for s in series]),
        ("time_to_first_token_seconds", "From the request to a row's first token.", [s.first_token for s in series]),
        ("inter_token_latency_seconds", "Between two tokens of a row.", [s.between_tokens for s in series]),
        ("request_duration_seconds", "From the request to its end.", [s.whole_request for s in series]),
    ):
        out.histogram(f"adaplex_{name}", told, zip(adapter, histograms, strict=True))


def _shapes(out: Exposition, shapes: RequestShapes) -> None:
    """What is not told by adapter, so that a scrape stays small."""
    for name, told, histogram in (
        ("request_prompt_tokens", "Tokens of a request's prompt.", shapes.prompt_tokens),
        ("request_generated_tokens", "Tokens of a row's answer.", shapes.answer_tokens),
        ("prefill_seconds", "From a row's place in a step to its first token.", shapes.prefill),
        ("decode_seconds", "From a row's first token to its last.", shapes.decode),
    ):
        out.histogram(f"adaplex_{name}", told, [({}, histogram)])


def _rows(out: Exposition, rows: Collection[RowInFlight]) -> None:
    kinds = Counter(row.kind for row in rows)
    told = "Rows in the engine, waiting or running, by the kind of their adapter."
    out.family("gauge", "adaplex_rows", told, [({"kind": kind}, kinds[kind]) for kind in sorted({*kinds, "base"})])


def _steps(out: Exposition, figures: EngineFigures) -> None:
    phases = [({"phase": phase}, histogram) for phase, histogram in figures.step_seconds.items()]
    stages = [({"stage": stage}, histogram) for stage, histogram in figures.swaps.items()]
    out.histogram("adaplex_step_seconds", "Time of an engine step, by what its rows did.", phases)
    out.histogram("adaplex_step_rows", "Rows of a step.", [({}, figures.step_rows)])
    out.histogram("adaplex_step_adapters", "Different adapters in a step.", [({}, figures.step_adapters)])
    out.histogram("adaplex_step_tokens", "Tokens computed in a step.", [({}, figures.step_tokens)])
    for name, told, count in (
        ("step_prefill_rows", "Rows that computed prompts, summed over steps.", figures.prefill_rows),
        ("step_decode_rows", "Rows that decoded, summed over steps.", figures.decode_rows),
        ("step_base_rows", "Rows without an adapter, summed over steps.", figures.base_rows),
    ):
        out.counter(f"adaplex_{name}_total", told, count)
    told = "Bringing an adapter to the device: read from the store to host memory, copy from there."
    out.histogram("adaplex_adapter_swap_seconds", told, stages)


def _engine(out: Exposition, stats: EngineStats, info: EngineInfo) -> None:
    """Gauges, and totals that count since the engine started (a restart is a reset, which Prometheus knows)."""
    labels = {"device": info.device, "dtype": info.dtype, "base_format": info.base_format}
    out.gauge("adaplex_engine_info", "What the engine runs on.", 1, labels)
    for name, told, count in (
        ("requests_waiting", "Rows in the queue.", stats.waiting),
        ("requests_running", "Rows in the batch.", stats.running),
        ("rows_capacity", "Rows of one step at most.", info.max_rows),
        ("queue_capacity", "Rows that may wait.", info.max_waiting),
        ("kv_pages_used", "Pages of the KV cache held by rows.", stats.pages_used),
        ("kv_pages_cached", "Pages held by the prefix cache alone.", stats.pages_cached),
        ("kv_pages_capacity", "Pages of the KV cache.", stats.pages_total),
        ("adapters_resident", "Adapters on the device.", stats.adapters_resident),
        ("adapter_slots_capacity", "Adapters that can be on the device.", stats.slots_total),
        ("adapter_rank_rows_used", "Device room for adapters that is taken, in ranks.", stats.rank_rows_used),
        ("adapter_rank_rows_capacity", "Device room for adapters, in ranks.", stats.rank_rows_total),
        ("adapter_host_bytes", "Adapters kept in host memory.", stats.host_adapter_bytes),
        ("base_bytes", "Weights of the base.", info.base_bytes),
        ("engine_resident_memory_bytes", "Host memory of the engine process.", _resident(info.pid)),
    ):
        out.gauge(f"adaplex_{name}", told, count)
    for name, told, value in (
        ("adapter_loads", "Copies of adapters to the device.", stats.adapter_loads),
        ("adapter_evictions", "Adapters that made room for others.", stats.adapter_evictions),
        ("preemptions", "Rows that gave up their pages and were resumed.", stats.preemptions),
        ("prefix_hit_tokens", "Prompt tokens found in the prefix cache.", stats.prefix_hit_tokens),
        ("prefix_query_tokens", "Prompt tokens looked up in the prefix cache.", stats.prefix_query_tokens),
    ):
        out.counter(f"adaplex_{name}_total", told, value)


def _resident(pid: int) -> float:
    try:
        return float(psutil.Process(pid).memory_info().rss)
    except psutil.Error:  # it has just ended; the next scrape sees its successor
        return 0.0


def _training(out: Exposition, training: TrainingFigures) -> None:
    """Jobs by state, all states always; of those that run, how far they are."""
    jobs = [({"status": status}, training.jobs.get(status, 0)) for status in STATUSES]
    out.family("gauge", "adaplex_training_jobs", "Training jobs by state.", jobs)
    running = [({"adapter": one.adapter}, one) for one in training.running]
    for name, told, values in (
        ("training_step", "The last step that a running job has told.", [one.step for _, one in running]),
        ("training_loss", "Loss of that step.", [one.loss for _, one in running]),
        ("training_tokens", "Tokens that it has been trained on.", [one.tokens for _, one in running]),
        ("training_seconds_left", "What it expects still to need.", [one.seconds_left for _, one in running]),
    ):
        found = [(labels, v) for (labels, _), v in zip(running, values, strict=True) if v is not None]
        out.family("gauge", f"adaplex_{name}", told, found)
