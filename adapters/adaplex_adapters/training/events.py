"""The log of a run, for programs: one JSON object a line in events.jsonl, only ever appended to.

Every line has `seq` (from 1, without gaps), `at` (Unix seconds) and `type`:

    started {pid, resumed_step}     message {text}            plan {...}            running {steps, step}
    step {step, steps, loss, learning_rate, gradient_norm, tokens, tokens_per_second, seconds_left}
    evaluation {step, loss, perplexity, metrics, best}         checkpoint {step, path}
    paused {step}                   succeeded {...result}     failed {error, message, param}

After a kill the steps since the last checkpoint are told again, with the same figures: the last line of a step counts.
A torn last line is cut off when the log is opened.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adaplex_adapters.durable import disk_errors
from adaplex_adapters.training.job_terms import EVENTS
from adaplex_adapters.training.loop import StepReport
from adaplex_adapters.training.measuring import Measurement

_LASTING = ("checkpoint", "paused", "succeeded", "failed")


class EventLog:
    """Writes the events of one run; a Progress. Its only writer is the process that trains."""

    def __init__(self, folder: Path, every: int = 1) -> None:
        self._folder, self._every = folder, every
        self._steps = self._done = self._tokens = 0
        self._began = time.monotonic()
        with disk_errors("Opening the log of the run"):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(folder / EVENTS, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._seq = self._mend()

    def _mend(self) -> int:
        """Cut off a torn last line. Returns the number of the last whole one."""
        path = self._folder / EVENTS
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        os.ftruncate(self._file, whole)
        lines = data[:whole].splitlines()
        return int(json.loads(lines[-1])["seq"]) if lines else 0

    @disk_errors("Writing the log of the run")
    def write(self, kind: str, **fields: Any) -> None:
        """One event; returns when a reader sees it, and for lasting ones when it is on the disk."""
        self._seq += 1
        line = {"seq": self._seq, "at": round(time.time(), 3), "type": kind, **_finite(fields)}
        os.write(self._file, json.dumps(line).encode() + b"\n")
        if kind in _LASTING:
            os.fsync(self._file)

    def note(self, text: str) -> None:
        self.write("message", text=text)

    def begin(self, steps: int, done: int) -> None:
        self._steps, self._done, self._tokens, self._began = steps, done, 0, time.monotonic()
        self.write("running", steps=steps, step=done)

    def step(self, report: StepReport) -> None:
        self._tokens += report.tokens
        if report.step % self._every and report.step != self._steps:
            return
        seconds = max(1e-9, time.monotonic() - self._began)
        self.write(
            "step",
            step=report.step,
            steps=self._steps,
            loss=report.loss,
            learning_rate=report.learning_rate,
            gradient_norm=report.gradient_norm,
            tokens=report.tokens,
            tokens_per_second=round(self._tokens / seconds, 1),
            seconds_left=round(seconds / max(1, report.step - self._done) * (self._steps - report.step), 1),
        )

    def measured(self, found: Measurement, best: bool) -> None:
        self.write("evaluation", **found.plain(), best=best)

    def saved(self, step: int, path: Path) -> None:
        self.write("checkpoint", step=step, path=str(path.relative_to(self._folder)))

    def end(self) -> None:
        pass


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """Every whole event of a run's folder, in order."""
    with (folder / EVENTS).open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
