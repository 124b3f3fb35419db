"""Curves for TensorBoard, where it is asked for (extra 'report')."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adaplex_adapters.errors import StartupError
from adaplex_adapters.training.loop import StepReport
from adaplex_adapters.training.measuring import Measurement


class TensorBoard:
    """A Progress that writes scalars into a folder. Raises StartupError where tensorboard is not installed."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise StartupError(
                f"tensorboard needs the extra 'report' (pip install 'adaplex[report]'): {error}"
            ) from error
        self._writer: Any = SummaryWriter(str(folder))

    def note(self, text: str) -> None:
        pass

    def begin(self, steps: int, done: int) -> None:
        pass

    def step(self, report: StepReport) -> None:
        for name in ("loss", "learning_rate", "gradient_norm"):
            self._writer.add_scalar(f"train/{name}", getattr(report, name), report.step)

    def measured(self, found: Measurement, best: bool) -> None:
        self._writer.add_scalar("held_out/loss", found.loss, found.step)
        for name, value in found.metrics.items():
            self._writer.add_scalar(f"held_out/{name}", value, found.step)

    def saved(self, step: int, path: Path) -> None:
        self._writer.flush()

    def end(self) -> None:
        self._writer.flush()
