"""What is known about a finished run. These types own nothing and are never changed."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from adaplex_adapters.training.conversations import Chat, Completion, Example, answer_of
from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.rows import DataReport

_DISTRIBUTIONS = ("adaplex", "torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class TrainResult:
    """Losses are means over the answers' tokens (nats); those on held-out rows are None when none were held out.

    parameters: trained scalars. tokens: real tokens read in all steps. seconds: the steps alone. best_step: of the
    weights that were taken, None for the last. peak_bytes: as `memory.peak_bytes` measures it.
    """

    out: Path
    examples: int
    held_out: int
    too_long: int
    parameters: int
    steps: int
    tokens: int
    seconds: float
    loss_first: float
    loss_last: float
    held_out_before: float | None
    held_out_after: float | None
    metrics_before: Mapping[str, float] = field(default_factory=dict)
    metrics_after: Mapping[str, float] = field(default_factory=dict)
    best_step: int | None = None
    peak_bytes: int = 0
    planned_bytes: int | None = None


@dataclass(frozen=True)
class Sample:
    """A held-out row, answered by both."""

    asked: str
    wanted: str
    base: str
    adapter: str

    @staticmethod
    def of(example: Example, base: str, adapter: str) -> Sample:
        """The row's last question."""
        if isinstance(example, Chat):
            asked = next((m.content for m in reversed(example.messages) if not m.learned), "")
        else:
            asked = example.prompt if isinstance(example, Completion) else ""
        return Sample(asked, answer_of(example), base.strip(), adapter.strip())


@dataclass(frozen=True)
class RunRecord:
    """curve: (step, loss, learning rate). history: measurements as `Measurement.plain` gives them. source: of the
    data, as the user named it.
    """

    result: TrainResult
    options: TrainOptions
    data: DataReport
    base: str
    form: str
    curve: tuple[tuple[int, float, float], ...]
    history: tuple[Mapping[str, Any], ...]
    samples: tuple[Sample, ...]
    source: str | None = None


def versions() -> dict[str, str]:
    """Of what took part."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
