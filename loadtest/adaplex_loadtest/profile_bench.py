"""Where each microsecond of a decode step goes: kernels by name, gaps between them, and the host's share.

Decode steps of a full batch run under torch's profiler, which costs some time itself, and beside it without, for the
time that a step really takes. Each kernel, and the step, is a JSON line.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from adaplex_loadtest.engine_bench import Batch, EngineBench, memory_limit, random_adapters
from adaplex_loadtest.statistics import report
from adaplex_server.engine.settings import EngineSettings
from adaplex_server.model.base import Base
from adaplex_server.model.families import base_shape


@dataclass(frozen=True)
class Kernel:
    """One launch that the profiler saw; microseconds."""

    name: str
    begin: float
    end: float


def bench(
    base: Base, settings: EngineSettings, batches: Sequence[Batch], rank: int, steps: int, most: int = 30
) -> list[str]:
    """Lines for each batch: the step, then up to `most` kernels, the costliest first. steps: that are profiled."""
    adapters = random_adapters(base_shape(base.config), rank, max(batch.adapters for batch in batches), base.dtype)
    running = EngineBench(base, settings, adapters)
    lines = []
    for batch in batches:
        running.begin(batch)
        plain, waiting = _timed(running, steps)
        with profile(
            activities=[ProfilerActivity.CUDA if base.device.type == "cuda" else ProfilerActivity.CPU]
        ) as seen:
            profiled, _ = _timed(running, steps)
        running.finish()
        kernels = _kernels(seen)
        busy = _covered(kernels)
        shared: dict[str, Any] = {"benchmark": "profile", "shape": base.config.name, "format": base.format}
        shared |= {"rows": batch.rows, "adapters": batch.adapters}
        limit = None if base.device.type == "cpu" else memory_limit(base, batch, adapters)
        lines.append(
            report(
                **shared,
                what="step",
                step_us=round(plain / steps * 1e6, 1),
                host_us=round((plain - waiting) / steps * 1e6, 1),
                waiting_us=round(waiting / steps * 1e6, 1),
                profiled_step_us=round(profiled / steps * 1e6, 1),
                kernels_us=round(busy / steps, 1),
                gaps_us=round(profiled / steps * 1e6 - busy / steps, 1),
                launches=round(len(kernels) / steps, 1),
                limit_us=None if limit is None else round(limit * 1e6, 1),
            )
        )
        lines += [report(**shared, what="kernel", **row) for row in _by_name(kernels, steps)[:most]]
    return lines


def _timed(running: EngineBench, steps: int) -> tuple[float, float]:
    """Seconds of so many steps, and of them those in which the host only waited for the device."""
    waited = 0.0
    executor: Any = running.engine.parts.executor
    settle: Callable[..., Any] = executor.settle

    def timed(*arguments: Any) -> Any:
        nonlocal waited
        began = time.perf_counter()
        result = settle(*arguments)
        waited += time.perf_counter() - began
        return result

    executor.settle = timed
    began = time.perf_counter()
    for _ in range(steps):
        running.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    del executor.settle
    return seconds, waited


def _kernels(seen: profile) -> list[Kernel]:
    """What ran on the device; without one, the operators that call no other."""
    events: Any = seen.events()
    on_device = [event for event in events if event.device_type.name == "CUDA"]
    chosen = on_device or [event for event in events if not event.cpu_children]
    return [Kernel(event.name, event.time_range.start, event.time_range.end) for event in chosen]


def _covered(kernels: Sequence[Kernel]) -> float:
    """Microseconds in which at least one ran."""
    covered, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda one: one.begin):
        covered += max(0.0, kernel.end - max(kernel.begin, until))
        until = max(until, kernel.end)
    return covered


def _by_name(kernels: Sequence[Kernel], steps: int) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        times[kernel.name].append(kernel.end - kernel.begin)
    total = sum(map(sum, times.values()))
    return [
        {
            "name": name[:120],
            "a_step": round(len(each) / steps, 2),
            "us_a_step": round(sum(each) / steps, 2),
            "us_each": round(sum(each) / len(each), 2),
            "share": round(sum(each) / total, 4) if total else 0.0,
        }
        for name, each in sorted(times.items(), key=lambda item: -sum(item[1]))
    ]
