"""Requests and answers of /v1/files and /v1/fine_tuning/jobs, in OpenAI's shapes."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct
from pydantic import Field

from adaplex_server.http_api.schemas.fields import RequestModel

# ---- /v1/files -------------------------------------------------------------------------------------------------------


class File(Struct, frozen=True):
    """An uploaded file, or one that a job has made."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    sha256: str
    status: Literal["processed"] = "processed"
    object: Literal["file"] = "file"


class FileList(Struct, frozen=True):
    """The newest first."""

    data: list[File]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: Literal["list"] = "list"


class FileDeleted(Struct, frozen=True):
    """The file is gone; jobs that have read it are not touched."""

    id: str
    deleted: bool = True
    object: Literal["file"] = "file"


# ---- /v1/fine_tuning/jobs --------------------------------------------------------------------------------------------


class Supervised(RequestModel):
    """Options of the trainer by any of their usual names (n_epochs, lora_r, learning_rate, ...)."""

    hyperparameters: dict[str, Any] | None = None


class Method(RequestModel):
    """Only supervised fine-tuning is offered."""

    type: Literal["supervised"]
    supervised: Supervised | None = None


class CreateJob(RequestModel):
    """As OpenAI's clients send it. suffix: the name that the adapter will be served under."""

    model: str = Field(max_length=1000)
    training_file: str = Field(max_length=200)
    validation_file: str | None = Field(None, max_length=200)
    suffix: str | None = Field(None, max_length=96, description="The adapter's name; one is made if there is none.")
    seed: int | None = Field(None, ge=0, lt=1 << 31)
    hyperparameters: dict[str, Any] | None = None
    method: Method | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)
    integrations: list[Any] | None = Field(None, max_length=0)
    register_worse: bool = Field(False, description="Serve the result even if it is no better than the base.")


class JobErrorTold(Struct, frozen=True):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class Job(Struct, frozen=True):
    """A fine-tuning job. fine_tuned_model: what requests name, once it is served; revision: its content."""

    id: str
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    status: str
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    seed: int
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    metadata: dict[str, str]
    error: JobErrorTold | None
    adapter: str
    revision: str | None
    organization_id: str = "adaplex"
    integrations: list[Any] = []
    object: Literal["fine_tuning.job"] = "fine_tuning.job"


class JobList(Struct, frozen=True):
    """The newest first."""

    data: list[Job]
    has_more: bool
    object: Literal["list"] = "list"


class Event(Struct, frozen=True):
    """Something that a job has told. type: "message", or "metrics" with step, loss and the like in `data`."""

    id: str
    created_at: int
    level: str
    type: str
    message: str
    data: dict[str, Any]
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"


class EventList(Struct, frozen=True):
    """The newest first."""

    data: list[Event]
    has_more: bool
    object: Literal["list"] = "list"


class Checkpoint(Struct, frozen=True):
    """A state that a job can go on from."""

    id: str
    created_at: int
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float]
    fine_tuned_model_checkpoint: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"


class CheckpointList(Struct, frozen=True):
    """The newest first."""

    data: list[Checkpoint]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: Literal["list"] = "list"
