"""The kernels of a decode step one by one, each beside the time that its bytes take: a JSON line for each.

Calls go through the layers of a base in turn, so that no weight is still in the device's cache, and are replayed as a
CUDA graph, so that the host is not measured. Weights, adapters, keys and values are random.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from adaplex_loadtest.engine_bench import random_adapters
from adaplex_loadtest.statistics import percentile, report
from adaplex_server.kernels import dense
from adaplex_server.kernels.attention import attention, attention_rows
from adaplex_server.kernels.finish import finished
from adaplex_server.kernels.lora import LoraPages, LoraPlan, LoraStack, plan_lora
from adaplex_server.model.adapted_linear import adapted_linear
from adaplex_server.model.adapter_pool import RANK_PAGE, AdapterPool, allocate_pool, write_adapter
from adaplex_server.model.base import Base
from adaplex_server.model.families import base_shape

BYTES_PER_SECOND = 4.27e12
"""What an H200's memory was measured to copy, read and written counted."""
_LAYERS = 8
"""Layers gone through: at the shape of an 8B base their weights are several times the device's cache."""


@dataclass(frozen=True)
class KernelLoad:
    """rows: of the batches. adapters: different ones in a batch. contexts: tokens that attention sees."""

    rows: tuple[int, ...] = (1, 8, 16, 32, 64, 128)
    adapters: tuple[int, ...] = (1, 8, 64)
    rank: int = 16
    contexts: tuple[int, ...] = (577, 4096)
    page_size: int = 16


def bench(base: Base, load: KernelLoad) -> list[str]:
    """A line for each kernel and batch: microseconds a call, those of its bytes alone, and the share."""
    lines = []
    pool = _pool(base, load)
    for rows in load.rows:
        for figures, nbytes, calls in _all(base, pool, load, rows):
            seconds = seconds_of(calls, base.device)
            limit = None if base.device.type == "cpu" else nbytes / BYTES_PER_SECOND
            lines.append(
                report(
                    benchmark="kernels",
                    shape=base.config.name,
                    format=base.format,
                    rows=rows,
                    **figures,
                    us=round(seconds * 1e6, 2),
                    mib=round(nbytes / (1 << 20), 3),
                    limit_us=None if limit is None else round(limit * 1e6, 2),
                    share_of_limit=None if limit is None else round(limit / seconds, 3),
                )
            )
    return lines


Measured = tuple[dict[str, Any], float, Sequence[Callable[[], Any]]]


def _all(base: Base, pool: AdapterPool, load: KernelLoad, rows: int) -> Iterator[Measured]:
    yield from _linears(base, rows)
    yield _head(base, rows)
    for adapters in load.adapters:
        if adapters <= rows:
            yield from _adapted(base, pool, load, rows, adapters)
    for context in load.contexts:
        if context <= base.config.max_context:
            yield _attention(base, load, rows, context)


def _linears(base: Base, rows: int) -> Iterator[Measured]:
    for name, first in base.layers[0].linears.items():
        calls = _through_layers(base, name, _random(base, rows, first.in_features), None)
        yield {"kernel": "linear", "linear": name}, first.nbytes() + _moved(base, rows, first), calls


def _through_layers(base: Base, name: str, x: torch.Tensor, plan: LoraPlan | None) -> list[Callable[[], torch.Tensor]]:
    def call(number: int) -> torch.Tensor:
        return finished(adapted_linear(base.layers[number].linears[name], x, plan, name, number))

    return [partial(call, number) for number in range(min(_LAYERS, base.config.num_layers))]


def _head(base: Base, rows: int) -> Measured:
    x = _random(base, rows, base.config.hidden_size)
    nbytes = base.head.nbytes + x.nbytes + rows * base.config.vocab_size * base.dtype.itemsize
    return {"kernel": "head"}, nbytes, [lambda: dense.linear(x, base.head)] * 2


def _adapted(base: Base, pool: AdapterPool, load: KernelLoad, rows: int, adapters: int) -> Iterator[Measured]:
    """A linear with the deltas of its rows' adapters, which go round."""
    plan = _plan(pool, [row % adapters for row in range(rows)])
    for name, first in base.layers[0].linears.items():
        targets = pool.linears[name].targets
        values = load.rank * (targets.in_features * len(targets.names) + targets.out_features)
        nbytes = first.nbytes() + _moved(base, rows, first) + adapters * values * base.dtype.itemsize
        calls = _through_layers(base, name, _random(base, rows, first.in_features), plan)
        figures = {"kernel": "linear and adapters", "linear": name, "adapters": adapters, "rank": load.rank}
        yield figures, nbytes, calls


def _attention(base: Base, load: KernelLoad, rows: int, context: int) -> Measured:
    config, device, size = base.config, base.device, load.page_size
    pages = -(-context // size)
    shape = (rows * pages + 1, size, config.num_kv_heads, config.head_dim)
    layers = [[torch.randn(shape, dtype=base.dtype, device=device) for _ in "kv"] for _ in range(2)]
    q = torch.randn(rows, config.num_heads, config.head_dim, dtype=base.dtype, device=device)
    table = torch.randperm(rows * pages, device=device).add_(1).to(torch.int32).view(rows, pages)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
    contexts = torch.full((rows,), context, dtype=torch.int32, device=device)
    batch = attention_rows(
        starts, contexts, table, (1,) * rows, (context,) * rows, size, config.num_kv_heads, config.num_heads, [None]
    )
    scale = config.head_dim**-0.5
    calls = [partial(attention, q, keys, values, batch, scale, None) for keys, values in layers]
    nbytes = 2 * rows * context * config.num_kv_heads * config.head_dim * base.dtype.itemsize + 2 * q.nbytes
    return {"kernel": "attention", "context": context}, nbytes, calls


def _random(base: Base, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=base.dtype, device=base.device)


def _moved(base: Base, rows: int, linear: Any) -> int:
    """Bytes of input and output."""
    return rows * (linear.in_features + linear.out_features) * base.dtype.itemsize


def _pool(base: Base, load: KernelLoad) -> AdapterPool:
    """As many adapters as any batch has, each in a slot of its number."""
    count, pages = max(load.adapters), -(-load.rank // RANK_PAGE)
    pool = allocate_pool(base.config, 1 + count * pages, count, pages, base.dtype, base.device)
    (adapter,) = random_adapters(base_shape(base.config), load.rank, 1, base.dtype)
    write_adapter(pool, base.config, 0, tuple(range(1, 1 + pages)), adapter)
    for slot in range(1, count):
        own = tuple(range(1 + slot * pages, 1 + (slot + 1) * pages))
        for linear in pool.linears.values():
            for rows in (linear.a, linear.b):
                rows[:, own[0] * RANK_PAGE : (own[-1] + 1) * RANK_PAGE] = rows[:, RANK_PAGE : (1 + pages) * RANK_PAGE]
            linear.scaling[:, slot] = linear.scaling[:, 0]
        pool.slot_pages[slot] = torch.tensor(own, dtype=torch.int32)
        pool.slot_page_count[slot] = pages
        pool.host_pages[slot] = own
    return pool


def _plan(pool: AdapterPool, slots: list[int]) -> LoraPlan:
    stacks = {
        name: LoraStack(linear.a, linear.b, linear.scaling, linear.targets.spans)
        for name, linear in pool.linears.items()
    }
    pages = LoraPages(pool.slot_pages, pool.slot_page_count, RANK_PAGE, pool.host_pages)
    plan = plan_lora(stacks, pages, (1,) * len(slots), slots)
    assert plan is not None
    return plan


@torch.inference_mode()
def seconds_of(calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int = 7) -> float:
    """Median seconds of one call, of `repeats` turns through all of them."""
    for call in calls:
        call()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            for call in calls:
                call()
            times.append(time.perf_counter() - began)
        return percentile(times, 0.5) / len(calls)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    graph.replay()
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize(device)
    del kept
    times = [first.elapsed_time(second) / 1e3 for first, second in itertools.pairwise(marks)]
    return percentile(times, 0.5) / len(calls)
