"""Training over gRPC, by a real server; the trainer only pretends to train."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
import pytest_asyncio

from adaplex_proto.v1 import adaplex_pb2 as pb
from adaplex_proto.v1 import adaplex_pb2_grpc as pb_grpc
from adaplex_server.caller import Limits
from adaplex_server.grpc_api.server import GrpcServer
from adaplex_server.service.access.gate import Gate
from adaplex_server.service.training.fine_tuning import FineTuning
from adaplex_server.service.training.settings import TrainingSettings

TRAINER = Path(__file__).parent.parent / "service" / "training" / "fake_trainer.py"


@pytest_asyncio.fixture
async def stub(tmp_path: Path) -> AsyncIterator[Any]:
    async def register(name: str, folder: Path) -> str:
        return "ab" * 32

    command = (sys.executable, str(TRAINER))
    settings = TrainingSettings(
        folder=tmp_path, base=tmp_path, base_name="b", command=command, max_file_bytes=200,
        check_options=lambda options: None,
    )  # fmt: skip
    training = FineTuning(settings, register)
    await training.open()
    service = SimpleNamespace(gate=Gate(None, Limits()), training=training, registry=None)
    server = GrpcServer(cast("Any", service), "127.0.0.1", 0, 1 << 20)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield pb_grpc.FineTuningStub(channel)
    await server.stop(0)
    await training.close()


async def uploaded(stub: Any, rows: int = 3) -> Any:
    async def parts() -> AsyncIterator[pb.UploadFileRequest]:
        yield pb.UploadFileRequest(file_name="rows.jsonl")
        for _ in range(rows):
            yield pb.UploadFileRequest(data=b'{"prompt": "a", "completion": "b"}\n')

    return await stub.UploadFile(parts())


async def test_from_a_file_to_an_adapter(stub: Any) -> None:
    file = await uploaded(stub)
    assert (file.file_name, file.size_bytes) == ("rows.jsonl", 105)
    wanted = pb.CreateJobRequest(training_file=file.id, adapter="made", options={"steps": "4", "pace": "0.01"}, seed=2)
    job = await stub.CreateJob(wanted)
    assert (job.status, job.seed, job.revision) == ("queued", 2, "")
    events = [event async for event in stub.WatchJob(pb.JobRequest(id=job.id))]
    steps = [json.loads(event.data_json)["step"] for event in events if event.message.startswith("Step")]
    assert steps == [1, 2, 3, 4] and [event.number for event in events] == list(range(1, len(events) + 1))
    done = await stub.GetJob(pb.JobRequest(id=job.id))
    assert (done.status, done.revision, done.trained_tokens) == ("succeeded", "ab" * 32, 1000)
    assert [one.id for one in (await stub.ListJobs(pb.ListJobsRequest())).jobs] == [job.id]


async def test_changes_and_errors(stub: Any) -> None:
    file = await uploaded(stub)
    job = await stub.CreateJob(pb.CreateJobRequest(training_file=file.id, options={"steps": "900", "pace": "0.02"}))
    assert (await stub.PauseJob(pb.JobRequest(id=job.id))).status == "paused"
    assert (await stub.ResumeJob(pb.JobRequest(id=job.id))).status == "queued"
    assert (await stub.CancelJob(pb.JobRequest(id=job.id))).status == "cancelled"
    for call, code in (
        (stub.CancelJob(pb.JobRequest(id=job.id)), grpc.StatusCode.FAILED_PRECONDITION),
        (uploaded(stub, rows=6), grpc.StatusCode.INVALID_ARGUMENT),
        (stub.GetJob(pb.JobRequest(id="ftjob-x")), grpc.StatusCode.NOT_FOUND),
        (stub.CreateJob(pb.CreateJobRequest(training_file="file-x")), grpc.StatusCode.NOT_FOUND),
        (
            stub.CreateJob(pb.CreateJobRequest(training_file=file.id, options={"r": "not json"})),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert refused.value.code() == code
