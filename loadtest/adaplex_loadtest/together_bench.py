"""Several adapters trained in the same passes, against one after the other: whole runs of the trainer on random rows,
of which the steps are timed.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import Any

from adaplex_adapters.training.encoding import EncodedExample
from adaplex_adapters.training.frozen_base import FrozenBase, quicken
from adaplex_adapters.training.loop import StepReport
from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.rows import DataReport, Rows
from adaplex_adapters.training.together import Task, train_together
from adaplex_adapters.training.trainer import Surroundings, train_rows
from adaplex_loadtest.statistics import percentile, report

STEPS, LEFT_OUT = 8, 3


class _Clock:
    """A Progress that notes when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def note(self, text: str) -> None:
        pass

    def begin(self, steps: int, done: int) -> None:
        pass

    def step(self, step: StepReport) -> None:
        self.ends.append(time.perf_counter())

    def measured(self, found: Any, best: bool) -> None:
        pass

    def saved(self, step: int, path: Path) -> None:
        pass

    def end(self) -> None:
        pass

    def seconds(self) -> float:
        """Of a step, without the first ones."""
        spans = [b - a for a, b in zip(self.ends[LEFT_OUT:], self.ends[LEFT_OUT + 1 :], strict=False)]
        return percentile(spans, 0.5)


def bench_together(base: FrozenBase, adapters: int, length: int, rank: int, checkpointing: bool) -> str:
    """A JSON line: milliseconds in which each of `adapters` makes a step over one row of `length` tokens."""
    if base.device.type == "cuda":
        quicken(base.model)
    options = TrainOptions(
        rank=rank, batch_size=1, held_out=0.0, max_steps=STEPS, eval_strategy="no", save_strategy="no",
        keep_best=False, gradient_checkpointing=checkpointing, learning_rate=1e-4,
    )  # fmt: skip
    rows = _rows(int(base.model.config.vocab_size), length)
    clocks = [_Clock() for _ in range(adapters)]
    with tempfile.TemporaryDirectory() as folder:
        alone = _Clock()
        train_rows(rows, base, Path(folder) / "alone", options, alone)
        tasks = {
            str(i): Task(rows, options, Path(folder) / str(i), clock, Surroundings()) for i, clock in enumerate(clocks)
        }
        train_together(tasks, base)
    apart, joined = alone.seconds() * adapters, clocks[0].seconds()
    return report(
        benchmark="train together", base=base.name, adapters=adapters, rows=1, length=length,
        checkpointing=checkpointing, one_after_the_other_ms=round(apart * 1e3, 1), together_ms=round(joined * 1e3, 1),
        times_faster=round(apart / joined, 2),
    )  # fmt: skip


def _rows(vocabulary: int, length: int) -> Rows:
    source = random.Random(7)
    examples = []
    for line in range(1, 2 * STEPS + 1):
        ids = tuple(source.randrange(vocabulary) for _ in range(length))
        examples.append(EncodedExample(line, ids, ids))
    told = DataReport(len(examples), 0, 0, 0, (), (), len(examples) * length, len(examples) * length, "0" * 64)
    return Rows(tuple(examples), (), (), told)
