"""Adapters that come and go: how soon a cold one can be used, what that costs the rows that run meanwhile, and how much
of the throughput is left when a thousand share few slots. Each figure is a JSON line with its goal.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from adaplex_loadtest.statistics import percentile, report, summary
from adaplex_loadtest.swap_load import SwapEngine, fill_store
from adaplex_server.engine.assembly import pool_dtype
from adaplex_server.engine.settings import EngineSettings
from adaplex_server.model.adapter_image import ImageLayout, pages_of_rank
from adaplex_server.model.base import Base

PINNED_GOAL_MS = 5.0
FILE_GOAL_MS = 40.0
CHURN_GOAL = 1.10
ZIPF_GOAL = 0.85
_PCIE = 55e9
"""Bytes a second from pinned memory to an H200, about."""


@dataclass(frozen=True)
class SwapLoad:
    """rows decode over `adapters` that stay; `swaps` a second come and go beside them for `seconds` of each kind.
    contents: different adapters on disk. registered, requests: of the Zipf traffic (exponent 1).
    """

    rank: int = 16
    rows: int = 32
    adapters: int = 8
    swaps: float = 20.0
    seconds: float = 4.0
    contents: int = 24
    prompt: int = 64
    output: int = 64
    registered: int = 1000
    slots: int = 64
    requests: int = 512


def bench(base: Base, load: SwapLoad, store: Path, threads: int | None) -> list[str]:
    """Cold adapters and churn on one engine, Zipf traffic on another."""
    kept, contents = fill_store(store, base, load.rank, load.contents)
    spare = 2
    settings = _settings(base, load, store, threads)
    waiting = SwapEngine(base, settings(load.adapters + spare, load.contents // 2 + 2), kept, contents)
    for number in range(load.contents):  # proves each, and lays it out on disk
        waiting.cold(number)
    near = range(load.adapters + spare + 2)
    lines = [_cold(base, waiting, load, "pinned", near, PINNED_GOAL_MS)]
    lines.append(_cold(base, waiting, load, "file", range(load.contents), FILE_GOAL_MS))
    lines += _churn(base, waiting, load)
    del waiting
    crowded = SwapEngine(base, settings(load.slots, load.slots), kept, contents)
    lines.append(_zipf(base, crowded, load))
    return lines


def _settings(base: Base, load: SwapLoad, store: Path, threads: int | None) -> Any:
    """EngineSettings with so many slots, and host memory for so many adapters."""
    layout = ImageLayout.of(base.config, pool_dtype(base.dtype, base.device))
    pages = pages_of_rank(load.rank)

    def make(slots: int, hosted: int) -> EngineSettings:
        return EngineSettings(
            base="-",
            store=str(store),
            base_name="bench",
            max_rows=max(load.rows * 2, load.slots),
            max_waiting=4 * load.requests,
            max_slots=slots,
            max_rank=load.rank,
            adapter_bytes=(slots * pages + 1) * layout.page_bytes,
            # A little more than the pages: scalings count, too.
            host_adapter_bytes=hosted * pages * layout.page_bytes + (1 << 20),
            max_context=2048 if base.config.max_context >= 2048 else None,
            prefix_cache=False,
            threads=threads,
        )

    return make


def _figures(base: Base, load: SwapLoad) -> dict[str, Any]:
    return {"benchmark": "swap", "shape": base.config.name, "format": base.format, "rank": load.rank}


def _cold(base: Base, engine: SwapEngine, load: SwapLoad, where: str, numbers: range, goal: float) -> str:
    """numbers: in turn, more than there are slots (and, for files, than host memory holds)."""
    times = [engine.cold(number) for _ in range(3) for number in numbers][len(numbers) :]
    layout = ImageLayout.of(base.config, pool_dtype(base.dtype, base.device))
    nbytes = pages_of_rank(load.rank) * layout.page_bytes
    return report(
        **_figures(base, load),
        what=f"cold from {where}",
        adapter_bytes=nbytes,
        ms=summary(times),
        goal_ms=goal,
        limit_ms=None if base.device.type == "cpu" else round(nbytes / _PCIE * 1e3, 3),
    )


Kind = Literal["nothing", "swap from pinned", "swap from file", "join resident", "join from file"]
_KINDS: tuple[Kind, ...] = ("nothing", "swap from pinned", "swap from file", "join resident", "join from file")


def _churn(base: Base, engine: SwapEngine, load: SwapLoad) -> list[str]:
    """Time between two tokens of rows that run, while adapters come and go beside them.

    A swap brings an adapter in place of another; a join is a short row of its own with an adapter, which stays in one
    case and is cold in the other. Swaps are compared with nothing, and joins of cold adapters with other joins.
    """
    gaps: dict[str, list[float]] = {}
    lines = []
    for kind in _KINDS:
        done, gaps[kind] = _disturb(engine, load, kind)
        against = gaps["join resident" if kind == "join from file" else "nothing"]
        p99 = percentile(gaps[kind], 0.99)
        lines.append(
            report(
                **_figures(base, load),
                what="churn",
                beside=kind,
                rows=load.rows,
                adapters=load.adapters,
                a_second=round(done / load.seconds, 1),
                inter_token_ms=summary(gaps[kind]),
                p99_ratio=round(p99 / percentile(against, 0.99), 3),
                goal_ratio=None if kind in ("nothing", "join resident") else CHURN_GOAL,
            )
        )
    return lines


def _disturb(engine: SwapEngine, load: SwapLoad, kind: Kind) -> tuple[int, list[float]]:
    """How many came, and the times between tokens of the rows that run throughout."""
    output = 1 << 20
    running = [engine.submit(row % load.adapters, load.prompt, output) for row in range(load.rows)]
    engine.tokens.clear()
    engine.run_until(lambda: {row for _, row in engine.tokens} >= set(running))
    numbers = _numbers(load, kind)
    began = time.perf_counter()
    end, sent, due = began + load.seconds, 0, began
    calls, joined = [], []
    engine.tokens.clear()
    while (now := time.perf_counter()) < end:
        if kind != "nothing" and now >= due:
            number = next(numbers)
            if kind.startswith("swap"):
                calls.append(engine.load(number))
            else:
                joined.append(engine.submit(number, load.prompt, 8))
            sent, due = sent + 1, due + 1 / load.swaps
        engine.step()
    watched = set(running)
    times = sorted({at for at, row in engine.tokens if row in watched})
    came = sum(call in engine.loaded for call in calls) + len(set(joined) & set(engine.ended))
    for row in running:
        engine.cancel(row)
    engine.run_until(lambda: engine.idle)
    return came, [later - sooner for sooner, later in itertools.pairwise(times)]


def _numbers(load: SwapLoad, kind: Kind) -> Iterator[int]:
    """Adapters to bring, in turn: those of the rows, some more that host memory holds, or all others."""
    first, most = (0, load.adapters) if kind == "join resident" else (load.adapters, load.contents)
    if kind == "swap from pinned":
        most = load.adapters + 4
    while True:
        yield from range(first, most)


def _zipf(base: Base, engine: SwapEngine, load: SwapLoad) -> str:
    """Tokens a second of a full engine over `registered` adapters, and over as many as there are slots."""
    began = time.perf_counter()
    loads = [engine.cold(number) for number in range(load.registered)]
    registering = time.perf_counter() - began
    drawn = zipf(load.registered, load.requests, seed=7)
    resident = [number % load.slots for number in drawn]
    for number in range(load.slots):
        engine.cold(number)
    speeds = {}
    for name, numbers in (("resident", resident), ("zipf", drawn)):
        evicted = engine.engine.stats().adapter_evictions
        speeds[name] = _throughput(engine, load, numbers)
    evicted = engine.engine.stats().adapter_evictions - evicted
    return report(
        **_figures(base, load),
        what="zipf",
        registered=load.registered,
        slots=load.slots,
        requests=load.requests,
        distinct=len(set(drawn)),
        swaps=evicted,
        tokens_per_second=round(speeds["zipf"], 1),
        all_resident_tokens_per_second=round(speeds["resident"], 1),
        ratio=round(speeds["zipf"] / speeds["resident"], 3),
        goal_ratio=ZIPF_GOAL,
        registering_seconds=round(registering, 2),
        tenth_load_ms=round(percentile(loads[5:15], 0.5) * 1e3, 2),
        last_load_ms=round(percentile(loads[-10:], 0.5) * 1e3, 2),
    )


def zipf(most: int, count: int, seed: int) -> list[int]:
    """`count` numbers below `most`, number i with a probability in proportion to 1 / (i + 1)."""
    weights = 1.0 / np.arange(1, most + 1)
    drawn = np.random.default_rng(seed).choice(most, size=count, p=weights / weights.sum())
    return [int(number) for number in drawn]


def _throughput(engine: SwapEngine, load: SwapLoad, numbers: list[int]) -> float:
    """Tokens a second while twice as many requests as rows are there, the next one sent when one has ended."""
    engine.ended.clear()
    jobs = iter(numbers)
    sent = min(len(numbers) // 2, 2 * load.slots)
    for number in itertools.islice(jobs, sent):
        engine.submit(number, load.prompt, load.output)
    engine.run_until(lambda: len(engine.ended) >= sent // 4)
    engine.tokens.clear()
    began, answered = time.perf_counter(), len(engine.ended)
    for number in jobs:
        while len(engine.ended) == answered:
            engine.step()
        answered += 1
        engine.submit(number, load.prompt, load.output)
    speed = len(engine.tokens) / (time.perf_counter() - began)
    engine.run_until(lambda: engine.idle)
    return speed
