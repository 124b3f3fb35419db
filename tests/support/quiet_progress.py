"""A Progress that remembers what it was told."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Quiet:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.losses: dict[int, float] = {}
        self.measurements: list[Any] = []
        self.checkpoints: list[int] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, steps: int, done: int) -> None:
        pass

    def step(self, report: Any) -> None:
        self.losses[report.step] = report.loss

    def measured(self, found: Any, best: bool) -> None:
        self.measurements.append(found)

    def saved(self, step: int, path: Path) -> None:
        self.checkpoints.append(step)

    def end(self) -> None:
        pass
