"""What a scrape tells of training jobs. Frozen; owns nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from adaplex_server.service.training.types import JobStatus

STATUSES: tuple[JobStatus, ...] = get_args(JobStatus)


@dataclass(frozen=True)
class RunningJob:
    """adapter: the name that it will be served under. All else as told last; None for what was not told."""

    adapter: str
    step: float | None
    loss: float | None
    tokens: float | None
    seconds_left: float | None


@dataclass(frozen=True)
class TrainingFigures:
    """jobs: how many have each status. running: of those that run now."""

    jobs: Mapping[str, int]
    running: tuple[RunningJob, ...]


def running_job(adapter: str, told: Mapping[str, Any]) -> RunningJob:
    """told: the data of its last step."""

    def number(name: str) -> float | None:
        value = told.get(name)
        return float(value) if isinstance(value, int | float) else None

    return RunningJob(adapter, number("step"), number("loss"), number("tokens"), number("seconds_left"))
