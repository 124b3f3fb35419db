"""/v1/fine_tuning/jobs: from an uploaded file to a served adapter, as OpenAI's clients drive it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from adaplex_adapters.errors import InvalidRequest, ModelNotFound
from adaplex_server.http_api.body import read_model
from adaplex_server.http_api.context import context_of
from adaplex_server.http_api.event_stream import DONE, event, open_stream
from adaplex_server.http_api.operation import Operation, json_response
from adaplex_server.http_api.paging import page, wanted
from adaplex_server.http_api.schemas.training import (
    Checkpoint,
    CheckpointList,
    CreateJob,
    Event,
    EventList,
    Job,
    JobErrorTold,
    JobList,
)
from adaplex_server.http_api.settings import HttpSettings
from adaplex_server.service.service import Service
from adaplex_server.service.training import types

_JOB = "/v1/fine_tuning/jobs/{job_id}"


class FineTuningJobs:
    """The jobs, as resources."""

    def __init__(self, service: Service, settings: HttpSettings) -> None:
        self._service = service
        self._settings = settings

    def operations(self) -> tuple[Operation, ...]:
        """What is served here."""
        many = "/v1/fine_tuning/jobs"
        changes = (("cancel", self.cancel), ("pause", self.pause), ("resume", self.resume))
        return (
            Operation(
                method="POST", path=many, handler=self.create, summary="Train an adapter on an uploaded file",
                body=CreateJob, answer=Job, errors=(400, 404, 409, 503, 507),
            ),
            Operation(method="GET", path=many, handler=self.list_all, summary="List jobs", answer=JobList),
            Operation(
                method="GET", path=_JOB, handler=self.describe, summary="Describe a job", answer=Job, errors=(404,)
            ),
            *(
                Operation(
                    method="POST", path=f"{_JOB}/{word}", handler=handler, summary=f"{word.capitalize()} a job",
                    answer=Job, errors=(404, 409),
                )
                for word, handler in changes
            ),
            Operation(
                method="GET", path=f"{_JOB}/events", handler=self.events, summary="What a job has told",
                answer=EventList, event=Event, errors=(404,),
            ),
            Operation(
                method="GET", path=f"{_JOB}/checkpoints", handler=self.checkpoints, summary="A job's checkpoints",
                answer=CheckpointList, errors=(404,),
            ),
        )  # fmt: skip

    async def create(self, request: Request) -> Response:
        """Answered when the job is durable; it waits for its turn."""
        limits = self._settings
        body = await read_model(request, CreateJob, limits.max_body_bytes, limits.body_idle)
        info, caller = self._service.info(), context_of(request.scope).caller
        if body.model not in (info.base, *info.aliases):
            raise ModelNotFound(
                f"The model {body.model[:96]!a} cannot be fine-tuned here; the base of this server is '{info.base}'.",
                param="model",
            )
        job = await self._service.training.create(
            training_file=body.training_file,
            validation_file=body.validation_file,
            adapter=body.suffix,
            options=_options(body),
            seed=body.seed,
            register_worse=body.register_worse,
            caller=caller,
            metadata=body.metadata or {},
        )
        return json_response(_told(job))

    async def list_all(self, request: Request) -> Response:
        """The newest first."""
        shown, more = page(request, self._service.training.jobs_of(context_of(request.scope).caller))
        return json_response(JobList([_told(job) for job in shown], more))

    async def describe(self, request: Request) -> Response:
        """One of them."""
        return json_response(_told(self._job(request)))

    async def cancel(self, request: Request) -> Response:
        """Its process is killed and what it has made is deleted."""
        return json_response(_told(await self._service.training.cancel(self._job(request).id)))

    async def pause(self, request: Request) -> Response:
        """Its process keeps a checkpoint and ends."""
        return json_response(_told(await self._service.training.pause(self._job(request).id)))

    async def resume(self, request: Request) -> Response:
        """It is queued again."""
        return json_response(_told(await self._service.training.resume(self._job(request).id)))

    async def events(self, request: Request) -> Response:
        """The newest first; with `stream=true`, from the first one on until the job has ended."""
        rows, job = self._service.training.rows, self._job(request)
        if request.query_params.get("stream") == "true":
            return await open_stream(request, _stream(self._service.training.watch(job.id)), self._settings)
        limit = wanted(request, 20)
        found = rows.last_events(job.id, _number(request.query_params.get("after"), job.id), limit + 1)
        return json_response(EventList([_event(one) for one in found[:limit]], len(found) > limit))

    async def checkpoints(self, request: Request) -> Response:
        """The newest first."""
        rows, job = self._service.training.rows, self._job(request)
        shown, more = page(request, [_checkpoint(one, job.adapter) for one in rows.checkpoints(job.id)], 10)
        first, last = (shown[0].id, shown[-1].id) if shown else (None, None)
        return json_response(CheckpointList(shown, more, first, last))

    def _job(self, request: Request) -> types.Job:
        """Which the path names, if the caller may see it."""
        return self._service.training.job(request.path_params["job_id"], context_of(request.scope).caller)


def _options(body: CreateJob) -> dict[str, Any]:
    """The trainer's options, from whichever of OpenAI's two places holds them; "auto" leaves one to its default."""
    given = dict(body.hyperparameters or {})
    if body.method is not None and body.method.supervised is not None:
        given |= body.method.supervised.hyperparameters or {}
    return {name: value for name, value in given.items() if value != "auto"}


async def _stream(events: AsyncIterator[types.JobEvent]) -> AsyncGenerator[bytes, None]:
    async for one in events:
        yield event(msgspec.json.encode(_event(one)))
    yield DONE


def _number(after: str | None, job_id: str) -> int | None:
    """The number in an event's id. Raises InvalidRequest."""
    if after is None:
        return None
    head, _, number = after.rpartition("-")
    if head != f"ftevent-{job_id}" or not number.isdecimal():
        raise InvalidRequest(f"after is {after[:80]!a}, which is no event of this job", param="after")
    return int(number)


def _told(job: types.Job) -> Job:
    error = None if job.error is None else JobErrorTold(job.error.code, job.error.message, job.error.param)
    options = dict(job.options)
    return Job(
        id=job.id,
        created_at=int(job.created),
        finished_at=None if job.finished is None else int(job.finished),
        estimated_finish=None if job.estimated_finish is None else int(job.estimated_finish),
        model=job.base,
        fine_tuned_model=job.adapter if job.revision else None,
        status=job.status,
        training_file=job.training_file,
        validation_file=job.validation_file,
        result_files=list(job.result_files),
        trained_tokens=job.trained_tokens,
        seed=job.seed,
        hyperparameters=options,
        method={"type": "supervised", "supervised": {"hyperparameters": options}},
        metadata=dict(job.metadata),
        error=error,
        adapter=job.adapter,
        revision=job.revision,
    )


def _event(one: types.JobEvent) -> Event:
    told = one.told
    return Event(
        f"ftevent-{one.job}-{one.number}", int(told.created), told.level, told.kind, told.message, dict(told.data)
    )


def _checkpoint(one: types.Checkpoint, adapter: str) -> Checkpoint:
    return Checkpoint(
        f"ftckpt-{one.job}-{one.step}", int(one.created), one.job, one.step, dict(one.metrics),
        f"{adapter}:step-{one.step}",
    )  # fmt: skip
