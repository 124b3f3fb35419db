"""The official client from upload to served adapter, over real HTTP; the trainer only pretends to train."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from adaplex_server.service.training.fine_tuning import FineTuning
from adaplex_server.service.training.settings import TrainingSettings

TRAINER = Path(__file__).parent.parent / "service" / "training" / "fake_trainer.py"
ROWS = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture(autouse=True)
def training(service: Any, tmp_path: Path) -> None:
    async def register(name: str, folder: Path) -> str:
        return str(service.registry.add(name, "trainer").revision)

    settings = TrainingSettings(
        folder=tmp_path, base=tmp_path, base_name="org/base", command=(sys.executable, str(TRAINER)),
        check_options=lambda options: None, max_file_bytes=2000,
    )  # fmt: skip
    service.training = FineTuning(settings, register)


def uploaded(client: openai.OpenAI) -> str:
    return client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id


def ended(client: openai.OpenAI, job_id: str) -> Any:
    limit = time.monotonic() + 15
    while time.monotonic() < limit:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(0.05)
    raise AssertionError(f"still {job.status}")


def test_files_come_and_go(client: openai.OpenAI) -> None:
    file_id = uploaded(client)
    file = client.files.retrieve(file_id)
    assert (file.filename, file.bytes, file.purpose, file.status) == ("rows.jsonl", len(ROWS), "fine-tune", "processed")
    assert client.files.content(file_id).read() == ROWS
    assert [one.id for one in client.files.list(purpose="fine-tune")] == [file_id]
    assert client.files.delete(file_id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file_id)


def test_from_upload_to_chatting_with_the_new_model(client: openai.OpenAI) -> None:
    job = client.fine_tuning.jobs.create(
        model="org/base",
        training_file=uploaded(client),
        suffix="support",
        seed=3,
        hyperparameters={"n_epochs": "auto", "batch_size": 4},
        metadata={"team": "a"},
    )
    assert job.status == "queued" and job.fine_tuned_model is None
    job = ended(client, job.id)
    assert (job.status, job.fine_tuned_model, job.trained_tokens, job.seed) == ("succeeded", "support", 1000, 3)
    assert job.metadata == {"team": "a"}
    answer = client.chat.completions.create(model="support", messages=[{"role": "user", "content": "x"}], max_tokens=5)
    assert answer.model == "support"
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert events[0].message == "The job has successfully completed."
    steps = [one.data["step"] for one in events if one.data.get("type") == "step"]
    assert steps == [3, 2, 1]
    assert [one.step_number for one in client.fine_tuning.jobs.checkpoints.list(job.id)] == [3, 2, 1]
    assert [one.id for one in client.fine_tuning.jobs.list()] == [job.id]
    assert client.files.content(job.result_files[0]).read() == b"<p>fine"


def test_events_as_a_stream_end_with_the_job(client: openai.OpenAI, http: httpx.Client) -> None:
    job = client.fine_tuning.jobs.create(model="base", training_file=uploaded(client))
    assert job.adapter.startswith("base-")  # of org/base
    with http.stream("GET", f"/v1/fine_tuning/jobs/{job.id}/events", params={"stream": "true"}) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    assert "successfully completed" in lines[-2]


def test_cancel_pause_and_resume(client: openai.OpenAI) -> None:
    options: Any = {"steps": 500, "pace": 0.02}
    job = client.fine_tuning.jobs.create(model="base", training_file=uploaded(client), hyperparameters=options)
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.cancel(job.id)


def test_bad_requests_say_what_is_wrong(client: openai.OpenAI, http: httpx.Client) -> None:
    file_id = uploaded(client)
    with pytest.raises(openai.NotFoundError, match="cannot be fine-tuned"):
        client.fine_tuning.jobs.create(model="gpt-4o", training_file=file_id)
    with pytest.raises(openai.NotFoundError, match="no file"):
        client.fine_tuning.jobs.create(model="base", training_file="file-nothing")
    with pytest.raises(openai.BadRequestError, match="name"):
        client.fine_tuning.jobs.create(model="base", training_file=file_id, suffix="../../etc")
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=("rows.jsonl", ROWS), purpose="assistants")
    assert http.get("/v1/fine_tuning/jobs", params={"limit": "0"}).status_code == 400
    assert http.get("/v1/fine_tuning/jobs", params={"after": "ftjob-x"}).status_code == 400
    parts = {"purpose": (None, "fine-tune"), "other": ("x", b"y")}
    assert http.post("/v1/files", files=parts).status_code == 400
    with pytest.raises(openai.APIStatusError, match="larger than 2000 bytes") as large:
        client.files.create(file=("rows.jsonl", ROWS * 100), purpose="fine-tune")
    assert large.value.status_code == 413
    assert len(client.fine_tuning.jobs.list().data) == 0
