"""From a JSONL file to a served adapter over HTTP, by the real trainer, through kills of everything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from running_server import RunningServer, command, free_port, running_server, wait_until_ready

from support.tiny_base import make_base, make_tokenizer

OPTIONS: dict[str, Any] = {"n_epochs": 6, "batch_size": 8, "learning_rate": 0.02, "r": 8, "quantize": "none"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny", make_tokenizer())


def rows(count: int = 160) -> bytes:
    """Letters to their successors: a task that a tiny model learns in seconds."""
    lines = []
    for i in range(count):
        letter = chr(ord("a") + i % 24)
        lines.append(json.dumps({"prompt": f"{letter}{i // 24} ->", "completion": f" {chr(ord(letter) + 1)}"}))
    return "\n".join(lines).encode()


def options(base: Path) -> list[str]:
    return [
        "--base",
        str(base),
        "--served-name",
        "tiny",
        "--quantize",
        "none",
        "--max-context",
        "256",
        "--threads",
        "1",
    ]


def client_of(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0)


def create(client: openai.OpenAI, **changed: Any) -> Any:
    file = client.files.create(file=("rows.jsonl", rows()), purpose="fine-tune")
    return client.fine_tuning.jobs.create(
        model="tiny", training_file=file.id, suffix="successor", seed=1, hyperparameters={**OPTIONS, **changed}
    )


def until(client: openai.OpenAI, job_id: str, statuses: set[str], seconds: float = 120) -> Any:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in statuses:
            return job
        time.sleep(0.1)
    raise AssertionError(
        f"{job.status} after {seconds} s: {[e.message for e in client.fine_tuning.jobs.list_events(job_id)]}"
    )


def test_from_a_file_to_chatting_with_the_new_model(base: Path, tmp_path: Path) -> None:
    with running_server(tmp_path, *options(base)) as server:
        client = client_of(server)
        job = until(client, create(client).id, {"succeeded", "failed"})
        assert job.status == "succeeded", job.error
        assert job.fine_tuned_model == "successor" and job.trained_tokens > 0
        events = list(client.fine_tuning.jobs.list_events(job.id, limit=100))
        losses = [one.data["loss"] for one in reversed(events) if one.data.get("type") == "step"]
        assert losses[-1] < losses[0] / 2
        reports = {client.files.retrieve(one).filename for one in job.result_files}
        assert {"report.html", "README.md"} <= reports
        answer = client.chat.completions.create(
            model="successor", messages=[{"role": "user", "content": "c1 ->"}], max_tokens=4, temperature=0
        )
        assert answer.model == "successor"
        told = httpx.get(f"{server.http}/v1/adapters/successor").json()
        assert (told["source"], told["revision"]) == ("trainer", job.revision)
        assert told["origin"]["job"] == job.id and len(told["origin"]["training_file_sha256"]) == 64


def test_bad_data_is_refused_with_its_line(base: Path, tmp_path: Path) -> None:
    with running_server(tmp_path, *options(base)) as server:
        client = client_of(server)
        data = rows(40) + b'\n{"prompt": 5}\n'
        file = client.files.create(file=("rows.jsonl", data), purpose="fine-tune")
        with pytest.raises(openai.BadRequestError, match="no option 'nonsense'"):
            client.fine_tuning.jobs.create(model="tiny", training_file=file.id, hyperparameters={"nonsense": 1})
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, hyperparameters=OPTIONS)
        job = until(client, job.id, {"failed"})
        assert "41" in job.error.message and job.fine_tuned_model is None


def test_kill_9_of_trainer_and_server_loses_nothing(base: Path, tmp_path: Path) -> None:
    http, grpc = free_port(), free_port()
    line = command(http, grpc, tmp_path / "data", *options(base))
    server = None

    def start() -> tuple[RunningServer, subprocess.Popen[bytes]]:
        with (tmp_path / "log").open("ab") as output:
            process = subprocess.Popen(line, stdout=output, stderr=output)
        running = RunningServer(process, f"http://127.0.0.1:{http}", "", tmp_path / "data", tmp_path / "log")
        wait_until_ready(running)
        return running, process

    server, process = start()
    try:
        client = client_of(server)
        job = create(client, n_epochs=30, save_strategy="steps", save_steps=5)
        until_told(client, job.id, "Step 10")
        trainer = next(tmp_path.glob("data/*/training/jobs/*/events.jsonl"))
        pid = next(
            line["pid"] for line in map(json.loads, trainer.read_text().splitlines()) if line["type"] == "started"
        )
        os.kill(pid, signal.SIGKILL)
        until_told(client, job.id, "signal 9")
        until_told(client, job.id, "going on after step")
        process.kill()
        process.wait()
        server, process = start()
        done = until(client, job.id, {"succeeded", "failed"})
        assert done.status == "succeeded", done.error
        events = list(client.fine_tuning.jobs.list_events(job.id, limit=1000))
        steps = [one.data["step"] for one in reversed(events) if one.data.get("type") == "step"]
        assert steps == sorted(set(steps)) and steps[0] == 1
        assert any("signal 9" in one.message for one in events)
        assert "successor" in {one.id for one in client.models.list()}
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def until_told(client: openai.OpenAI, job_id: str, words: str) -> None:
    limit = time.monotonic() + 90
    while time.monotonic() < limit:
        if any(words in one.message for one in client.fine_tuning.jobs.list_events(job_id, limit=1000).data):
            return
        time.sleep(0.05)
    raise AssertionError(f"nobody said {words!r}")
