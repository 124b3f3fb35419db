"""What a file and a job are, as every skin tells them. Owns nothing; all times are seconds since 1970."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

JobStatus = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
ENDED: frozenset[JobStatus] = frozenset({"succeeded", "failed", "cancelled"})


@dataclass(frozen=True)
class StoredFile:
    """An uploaded file, or one that a job has made. digest: SHA-256 (hex) of its bytes. owner: see `Caller.owner`."""

    id: str
    filename: str
    purpose: str
    nbytes: int
    digest: str
    created: float
    owner: str | None = None


@dataclass(frozen=True)
class JobError:
    """Why a job failed: a code of the error tree, and words that say what to do."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class Job:
    """One adapter to be trained. adapter: the name it will be served under. options: as the client wrote them.

    register_worse: serve the result even if it is no better than the base on the held-out rows. owner: see
    `Caller.owner`. attempts: how often its process has been started. consumed: bytes of what that process has told.
    step: the last one that was told. result_files: ids of files that it has made.
    """

    id: str
    created: float
    base: str
    adapter: str
    training_file: str
    validation_file: str | None
    options: Mapping[str, Any]
    seed: int
    register_worse: bool
    owner: str | None
    metadata: Mapping[str, str]
    status: JobStatus = "queued"
    started: float | None = None
    finished: float | None = None
    trained_tokens: int | None = None
    estimated_finish: float | None = None
    attempts: int = 0
    consumed: int = 0
    step: int = 0
    revision: str | None = None
    result_files: tuple[str, ...] = ()
    error: JobError | None = None


@dataclass(frozen=True)
class Origin:
    """Where a trained adapter comes from. file_digest: SHA-256 of the training file, None once that is deleted."""

    job: str
    base: str
    file: str
    file_digest: str | None


@dataclass(frozen=True)
class Told:
    """What is to be told of a job. kind: "message" or "metrics" (then data holds step, loss, ...)."""

    created: float
    level: Literal["info", "warn", "error"]
    kind: Literal["message", "metrics"]
    message: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class JobEvent:
    """number: counts within the job, from 1."""

    job: str
    number: int
    told: Told


@dataclass(frozen=True)
class Checkpoint:
    """A state that the job can go on from. metrics: held-out loss and the like at that step."""

    job: str
    step: int
    created: float
    metrics: Mapping[str, float]


def word(message: str, level: Literal["info", "warn", "error"] = "info") -> Told:
    """A message of now."""
    return Told(time.time(), level, "message", message)
