"""Telling a person how training goes: a bar on a terminal, lines everywhere else."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType
from typing import Protocol, TextIO

from adaplex_adapters.training.loop import StepReport


class Progress(Protocol):
    """What the trainer tells while it works."""

    def note(self, text: str) -> None: ...

    def begin(self, steps: int) -> None: ...

    def step(self, report: StepReport) -> None: ...

    def end(self) -> None: ...


class LineProgress:
    """A line about every `every` seconds; nothing is rewritten, so logs stay readable."""

    def __init__(self, stream: TextIO, every: float = 10.0) -> None:
        self._stream, self._every = stream, every
        self._steps = 0
        self._began = 0.0
        self._last = -math.inf

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def begin(self, steps: int) -> None:
        self._steps, self._began, self._last = steps, time.monotonic(), -math.inf

    def step(self, report: StepReport) -> None:
        now = time.monotonic()
        if now - self._last >= self._every or report.step == self._steps:
            self._last = now
            left = (now - self._began) / report.step * (self._steps - report.step)
            self.note(f"step {report.step}/{self._steps}  loss {report.loss:.4f}  {left:.0f} s left")

    def end(self) -> None:
        pass


class BarProgress:
    """rich's bar with loss, tokens a second and the time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.0f} tokens/s"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._began = 0.0
        self._tokens = 0

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def begin(self, steps: int) -> None:
        self._began, self._tokens = time.monotonic(), 0
        self._task = self._bar.add_task("training", total=steps, loss=float("nan"), speed=0.0)
        self._bar.start()

    def step(self, report: StepReport) -> None:
        self._tokens += report.tokens
        speed = self._tokens / max(1e-9, time.monotonic() - self._began)
        self._bar.update(self._task, completed=report.step, loss=report.loss, speed=speed)

    def end(self) -> None:
        self._bar.stop()


class ShownProgress:
    """The progress that fits the terminal, ended on every way out of a `with` block."""

    def __enter__(self) -> Progress:
        self._progress: Progress = BarProgress() if sys.stderr.isatty() else LineProgress(sys.stderr)
        return self._progress

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.end()
