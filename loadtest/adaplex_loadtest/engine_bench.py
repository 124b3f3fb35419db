"""The engine alone, in this process: prefill and decode-step times of a batch over distinct adapters, as one JSON line.

Needs only torch, triton (on a GPU), transformers, safetensors, numpy and msgspec: no bitsandbytes. Weights are random;
with an end token never chosen, time does not depend on them.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.spec import KIND_LORA, Adapter
from adaplex_loadtest.random_kinds import RandomKinds
from adaplex_loadtest.statistics import percentile, report
from adaplex_server.engine.assembly import assemble
from adaplex_server.engine.engine import Inbox
from adaplex_server.engine.messages import AdapterFailed, AdapterLoaded, Cancel, LoadAdapter, RowEnd, StepDone, Submit
from adaplex_server.engine.settings import EngineSettings
from adaplex_server.model.base import Base
from adaplex_server.model.families import base_shape
from adaplex_server.vocabulary import SamplingParams


@dataclass(frozen=True)
class Batch:
    """rows of equal prompts and answers; row i uses adapter i modulo `adapters` (0: the base alone) of those from
    `first` on.
    """

    rows: int
    adapters: int
    prompt_tokens: int
    output_tokens: int
    first: int = 0


@dataclass(frozen=True)
class Timed:
    """Seconds: until every row has its first token; of each step in which all rows decode; of everything."""

    prefill: float
    steps: tuple[float, ...]
    total: float


def random_adapters(shape: BaseShape, rank: int, count: int, dtype: torch.dtype) -> list[Adapter]:
    """LoRAs on every linear, in memory."""
    return RandomKinds(shape, rank, dtype).made((KIND_LORA,), count)


class EngineBench:
    """Owns an engine with its adapters loaded and proved."""

    def __init__(self, base: Base, settings: EngineSettings, adapters: Sequence[Adapter]) -> None:
        self._by_revision = {adapter.spec.revision: adapter for adapter in adapters}
        self._revisions = tuple(self._by_revision)
        self._inbox: Inbox = queue.SimpleQueue()
        self._sent: list[msgspec.Struct] = []
        self._rows = 0
        self._vocab = base.config.vocab_size
        self.engine, self.info = assemble(settings, base, self._by_revision.__getitem__, self._inbox, self._sent.append)
        for call, revision in enumerate(self._revisions):
            self._inbox.put(LoadAdapter(call, revision))
        self._run_until(lambda: self._answered() == len(self._revisions))
        failed = [m.message for m in self._sent if isinstance(m, AdapterFailed)]
        assert not failed, failed[0]

    def run(self, batch: Batch) -> Timed:
        """One batch from submission to its last token."""
        self._submit(batch)
        return self._time(batch.rows)

    def begin(self, batch: Batch) -> None:
        """Start a batch; returns once each of its rows decodes. `finish` ends it."""
        self._submit(batch)
        begun: set[int] = set()
        while len(begun) < batch.rows:
            self.step()
            begun |= {token.row for m in self._sent if isinstance(m, StepDone) for token in m.tokens}

    def step(self) -> None:
        """Let the engine do one step."""
        self.engine.take_messages(wait=False)
        self.engine.step()

    def finish(self) -> None:
        """End the rows of `begin`."""
        for row in range(1, self._rows + 1):
            self._inbox.put(Cancel(row))
        scheduler = self.engine.parts.scheduler
        self._run_until(lambda: self._inbox.empty() and scheduler.running + scheduler.waiting == 0)
        self._sent.clear()

    def _submit(self, batch: Batch) -> None:
        self._sent.clear()
        sampling = SamplingParams(max_tokens=batch.output_tokens, temperature=0, ignore_eos=True)
        for row in range(batch.rows):
            revision = self._revisions[batch.first + row % batch.adapters] if batch.adapters else None
            # Each prompt begins with its own token, so that no prefix is shared with this or an earlier batch.
            prompt = [(self._rows * 7919 + i * 31) % self._vocab for i in range(batch.prompt_tokens)]
            self._rows += 1
            self._inbox.put(Submit(self._rows, prompt, sampling, revision))

    def _time(self, rows: int) -> Timed:
        steps: list[float] = []
        began = last = time.perf_counter()
        first_tokens: set[int] = set()
        prefill = 0.0
        ended = 0
        while ended < rows:
            self.engine.take_messages(wait=False)
            self.engine.step()
            now = time.perf_counter()
            for message in self._sent:
                if isinstance(message, StepDone):
                    if not prefill:
                        first_tokens |= {token.row for token in message.tokens}
                        prefill = now - began if len(first_tokens) == rows else 0.0
                    elif len(message.tokens) == rows:
                        steps.append(now - last)
                    ended += len(message.ends)
                    self._refuse_errors(message.ends)
            self._sent.clear()
            last = now
        return Timed(prefill, tuple(steps), last - began)

    def _refuse_errors(self, ends: Sequence[RowEnd]) -> None:
        for end in ends:
            assert end.reason == "length", f"a row of the benchmark ended with {end.reason}: {end.message}"

    def _answered(self) -> int:
        """Loads that ended, well or not."""
        return sum(isinstance(message, AdapterLoaded | AdapterFailed) for message in self._sent)

    def _run_until(self, done: Callable[[], bool]) -> None:
        # Sleeping, as the engine's own loop does: a thread that spins takes the interpreter from the adapters' reader.
        busy = True
        while not done():
            self.engine.take_messages(wait=not busy)
            busy = self.engine.step()


def described(base: Base, batch: Batch) -> dict[str, Any]:
    """What a report says of the base and the batch."""
    return {
        "shape": base.config.name,
        "format": base.format,
        "device": str(base.device),
        "dtype": str(base.dtype).removeprefix("torch."),
        "rows": batch.rows,
        "adapters": batch.adapters,
    }


def bench(base: Base, settings: EngineSettings, batches: Sequence[Batch], rank: int, repeats: int = 3) -> list[str]:
    """A JSON line for each batch; the fastest of `repeats` prefills, and the median over all their steps."""
    count = max(batch.adapters for batch in batches)
    adapters = random_adapters(base_shape(base.config), rank, count, base.dtype)
    running = EngineBench(base, settings, adapters)
    lines = []
    for batch in batches:
        timed = [running.run(batch) for _ in range(repeats)]
        steps = [step for one in timed for step in one.steps]
        lines.append(
            report(
                benchmark="engine",
                **described(base, batch),
                rank=rank if batch.adapters else 0,
                prompt_tokens=batch.prompt_tokens,
                output_tokens=batch.output_tokens,
                prefill_ms=round(min(one.prefill for one in timed) * 1e3, 1),
                step_ms=round(percentile(steps, 0.5) * 1e3, 3),
                step_p99_ms=round(percentile(steps, 0.99) * 1e3, 3),
                limit_ms=None if base.device.type == "cpu" else round(memory_limit(base, batch, adapters) * 1e3, 3),
                decode_tokens_per_second=round(batch.rows / percentile(steps, 0.5), 1),
                tokens_per_second=round(batch.rows * batch.output_tokens / min(one.total for one in timed), 1),
            )
        )
    return lines


def memory_limit(base: Base, batch: Batch, adapters: Sequence[Adapter], bytes_per_second: float = 4.27e12) -> float:
    """Seconds that a decode step takes at least: each weight, adapter and KV page read once at the H200's measured copy
    rate.
    """
    config = base.config
    context = batch.prompt_tokens + batch.output_tokens / 2
    kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * base.dtype.itemsize * context * batch.rows
    # An embedding of its own is looked up, not read.
    embedding = 0 if config.tied_head else base.embedding.nbytes
    weights = sum(adapter.spec.nbytes for adapter in adapters[: batch.adapters])
    return (base.nbytes() - embedding + kv + weights) / bytes_per_second


def settings_for(
    batches: Sequence[Batch],
    rank: int,
    store: Path,
    *,
    threads: int | None,
    page_size: int,
    step_tokens: int | None = None,
    graphs: bool = True,
    overlap: bool = True,
) -> EngineSettings:
    """An engine with room for the largest batch; without the prefix cache, which would flatter repeated prompts."""
    return EngineSettings(
        base="-",
        store=str(store),
        base_name="bench",
        max_rows=max(batch.rows for batch in batches),
        max_waiting=max(batch.rows for batch in batches),
        max_step_tokens=step_tokens,
        max_slots=max(1, *(batch.adapters for batch in batches)),
        max_rank=rank,
        prefix_cache=False,
        page_size=page_size,
        threads=threads,
        decode_graphs=graphs,
        overlap=None if overlap else False,
    )
