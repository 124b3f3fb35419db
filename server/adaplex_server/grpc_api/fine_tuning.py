"""`adaplex.v1.FineTuning`: files and jobs, by the same service as over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc

from adaplex_adapters.durable import disk_errors
from adaplex_adapters.errors import InvalidRequest, RequestTooLarge
from adaplex_proto.v1 import adaplex_pb2 as pb
from adaplex_proto.v1 import adaplex_pb2_grpc as pb_grpc
from adaplex_server.grpc_api.access import caller_of
from adaplex_server.grpc_api.errors import streaming, unary
from adaplex_server.service.service import Service
from adaplex_server.service.training.types import Job, JobEvent


class FineTuningServicer(pb_grpc.FineTuningServicer):
    """Owns nothing; every rule is the service's."""

    def __init__(self, service: Service) -> None:
        self._service = service

    @unary
    async def UploadFile(
        self, requests: AsyncIterator[pb.UploadFileRequest], context: grpc.aio.ServicerContext
    ) -> pb.File:
        store, most, name, received = self._service.training.files, self._service.training.max_file_bytes, None, 0
        with store.incoming() as path:
            with disk_errors("Storing the upload"), path.open("wb") as out:
                async for request in requests:
                    if name is None:
                        if request.WhichOneof("part") != "file_name":
                            raise InvalidRequest("the first message must hold the file's name", param="file_name")
                        name = request.file_name
                        continue
                    if request.WhichOneof("part") != "data":
                        raise InvalidRequest("every message after the first must hold data", param="data")
                    received += len(request.data)
                    if received > most:
                        what = f"the file is larger than {most} bytes, which is the most this server takes"
                        raise RequestTooLarge(what, param="data")
                    await asyncio.to_thread(out.write, request.data)
            if name is None:
                raise InvalidRequest("no message came; the first must hold the file's name", param="file_name")
            owner = caller_of(context, self._service.gate).owner
            kept = await asyncio.to_thread(store.take, path, name, "fine-tune", owner)
        return pb.File(id=kept.id, file_name=kept.filename, size_bytes=kept.nbytes, sha256=kept.digest)

    @unary
    async def CreateJob(self, request: pb.CreateJobRequest, context: grpc.aio.ServicerContext) -> pb.Job:
        caller = caller_of(context, self._service.gate)
        job = await self._service.training.create(
            training_file=request.training_file,
            validation_file=request.validation_file or None,
            adapter=request.adapter or None,
            options={name: _value(name, text) for name, text in request.options.items()},
            seed=request.seed if request.HasField("seed") else None,
            register_worse=request.register_worse,
            caller=caller,
            metadata={},
        )
        return _told(job)

    @unary
    async def ListJobs(self, request: pb.ListJobsRequest, context: grpc.aio.ServicerContext) -> pb.ListJobsResponse:
        jobs = self._service.training.jobs_of(caller_of(context, self._service.gate))
        return pb.ListJobsResponse(jobs=[_told(job) for job in jobs])

    @unary
    async def GetJob(self, request: pb.JobRequest, context: grpc.aio.ServicerContext) -> pb.Job:
        return _told(self._job(request, context))

    @unary
    async def CancelJob(self, request: pb.JobRequest, context: grpc.aio.ServicerContext) -> pb.Job:
        return _told(await self._service.training.cancel(self._job(request, context).id))

    @unary
    async def PauseJob(self, request: pb.JobRequest, context: grpc.aio.ServicerContext) -> pb.Job:
        return _told(await self._service.training.pause(self._job(request, context).id))

    @unary
    async def ResumeJob(self, request: pb.JobRequest, context: grpc.aio.ServicerContext) -> pb.Job:
        return _told(await self._service.training.resume(self._job(request, context).id))

    @streaming
    async def WatchJob(self, request: pb.JobRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[pb.JobEvent]:
        async for event in self._service.training.watch(self._job(request, context).id):
            yield _event(event)

    def _job(self, request: pb.JobRequest, context: grpc.aio.ServicerContext) -> Job:
        """Which the request names, if the caller may see it."""
        return self._service.training.job(request.id, caller_of(context, self._service.gate))


def _value(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"the option {name[:60]!a} is {text[:60]!a}, which is not JSON", param="options") from None


def _told(job: Job) -> pb.Job:
    return pb.Job(
        id=job.id,
        adapter=job.adapter,
        status=job.status,
        training_file=job.training_file,
        validation_file=job.validation_file or "",
        created=job.created,
        started=job.started or 0,
        finished=job.finished or 0,
        estimated_finish=job.estimated_finish or 0,
        trained_tokens=job.trained_tokens or 0,
        seed=job.seed,
        revision=job.revision or "",
        result_files=job.result_files,
        error_code=job.error.code if job.error else "",
        error_message=job.error.message if job.error else "",
    )


def _event(event: JobEvent) -> pb.JobEvent:
    told = event.told
    data = json.dumps(dict(told.data)) if told.data else ""
    return pb.JobEvent(
        number=event.number, created=told.created, level=told.level, message=told.message, data_json=data
    )
