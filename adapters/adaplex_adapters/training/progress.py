"""Telling how training goes: a bar on a terminal, lines everywhere else, events for programs (in `events`)."""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from adaplex_adapters.training.loop import StepReport
from adaplex_adapters.training.measuring import Measurement


class Progress(Protocol):
    """What the trainer tells while it works. begin: `done` of `steps` were done before this process."""

    def note(self, text: str) -> None: ...

    def begin(self, steps: int, done: int) -> None: ...

    def step(self, report: StepReport) -> None: ...

    def measured(self, found: Measurement, best: bool) -> None: ...

    def saved(self, step: int, path: Path) -> None: ...

    def end(self) -> None: ...


class SupportsWrite(Protocol):
    """What lines are printed to."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> None: ...


class LineProgress:
    """A line about every `every` seconds; nothing is rewritten, so logs stay readable."""

    def __init__(self, stream: SupportsWrite, every: float = 10.0) -> None:
        self._stream, self._every = stream, every
        self._steps = self._done = self._tokens = 0
        self._began = 0.0
        self._last = -math.inf

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def begin(self, steps: int, done: int) -> None:
        self._steps, self._done, self._tokens = steps, done, 0
        self._began, self._last = time.monotonic(), -math.inf

    def step(self, report: StepReport) -> None:
        now = time.monotonic()
        self._tokens += report.tokens
        if now - self._last >= self._every or report.step == self._steps:
            self._last = now
            seconds = max(1e-9, now - self._began)
            left = seconds / max(1, report.step - self._done) * (self._steps - report.step)
            speed = f"{self._tokens / seconds:.0f} tokens/s"
            self.note(f"step {report.step}/{self._steps}  loss {report.loss:.4f}  {speed}  {left:.0f} s left")

    def measured(self, found: Measurement, best: bool) -> None:
        self.note(measurement_line(found, best))

    def saved(self, step: int, path: Path) -> None:
        pass

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

    def begin(self, steps: int, done: int) -> None:
        self._began, self._tokens = time.monotonic(), 0
        self._task = self._bar.add_task("training", total=steps, completed=done, loss=float("nan"), speed=0.0)
        self._bar.start()

    def step(self, report: StepReport) -> None:
        self._tokens += report.tokens
        speed = self._tokens / max(1e-9, time.monotonic() - self._began)
        self._bar.update(self._task, completed=report.step, loss=report.loss, speed=speed)

    def measured(self, found: Measurement, best: bool) -> None:
        self.note(measurement_line(found, best))

    def saved(self, step: int, path: Path) -> None:
        pass

    def end(self) -> None:
        self._bar.stop()


class SeveralProgress:
    """Tells all of several."""

    def __init__(self, parts: Sequence[Progress]) -> None:
        self._parts = parts

    def note(self, text: str) -> None:
        self._tell("note", text)

    def begin(self, steps: int, done: int) -> None:
        self._tell("begin", steps, done)

    def step(self, report: StepReport) -> None:
        self._tell("step", report)

    def measured(self, found: Measurement, best: bool) -> None:
        self._tell("measured", found, best)

    def saved(self, step: int, path: Path) -> None:
        self._tell("saved", step, path)

    def end(self) -> None:
        self._tell("end")

    def _tell(self, what: str, *arguments: Any) -> None:
        for part in self._parts:
            getattr(part, what)(*arguments)


class NamedProgress:
    """One of several runs: a line about every `every` seconds, with the run's name, to a progress that is shared."""

    def __init__(self, name: str, shared: Progress, every: float = 10.0) -> None:
        self._name, self._shared = name, shared
        self._lines = LineProgress(_Notes(self.note), every)

    def note(self, text: str) -> None:
        self._shared.note(f"{self._name}: {text}")

    def begin(self, steps: int, done: int) -> None:
        self._lines.begin(steps, done)

    def step(self, report: StepReport) -> None:
        self._lines.step(report)

    def measured(self, found: Measurement, best: bool) -> None:
        self._lines.measured(found, best)

    def saved(self, step: int, path: Path) -> None:
        pass

    def end(self) -> None:
        pass


class _Notes(io.TextIOBase):
    """A stream whose lines are notes."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note

    def write(self, text: str) -> int:
        if text.strip():
            self._note(text.rstrip("\n"))
        return len(text)


def measurement_line(found: Measurement, best: bool) -> str:
    """ "held-out loss after step 40: 0.1234 (perplexity 1.13), exact_match 0.920, best so far" """
    metrics = "".join(f", {name} {value:.3f}" for name, value in found.metrics.items())
    shown = f"{found.loss:.4f} (perplexity {found.perplexity:.2f}){metrics}"
    return f"held-out loss after step {found.step}: {shown}{', best so far' if best else ''}"


class ShownProgress:
    """The progress that fits the terminal, ended on every way out of a `with` block."""

    def __enter__(self) -> Progress:
        self._progress: Progress = BarProgress() if sys.stderr.isatty() else LineProgress(sys.stderr)
        return self._progress

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.end()
