"""`adaplex jobs` and the API key of the commands, against a server that only pretends to train."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adaplex_adapters.errors import AdaplexError, InvalidRequest
from adaplex_server.cli.jobs import app
from adaplex_server.cli.remote import call

JOB = {
    "id": "ftjob-1", "adapter": "a", "status": "succeeded", "fine_tuned_model": "a", "trained_tokens": 5,
    "created_at": 1, "error": None,
}  # fmt: skip
EVENTS = [
    {"message": "Step 1", "data": {"loss": 0.5, "tokens_per_second": 100.0}},
    {"message": "The job has successfully completed.", "data": {}},
]


class Handler(BaseHTTPRequestHandler):
    asked: list[tuple[str, str, Any]]

    def answer(self) -> None:
        length = int(self.headers.get("content-length", 0))
        body = self.rfile.read(length)
        type(self).asked.append((f"{self.command} {self.path}", self.headers.get("authorization", ""), body))
        if self.headers.get("authorization") == "Bearer wrong":
            self.send(401, json.dumps({"error": {"message": "not a key"}}).encode())
        elif "stream=true" in self.path:
            self.send(200, b"".join(b"data: " + json.dumps(e).encode() + b"\n\n" for e in EVENTS) + b"data: [DONE]\n\n")
        elif self.path == "/v1/models":
            self.send(200, b'{"data": [{"id": "base", "root": "base"}]}')
        elif self.path == "/v1/files":
            self.send(200, b'{"id": "file-1"}')
        elif self.command == "GET" and self.path.startswith("/v1/fine_tuning/jobs?"):
            self.send(200, json.dumps({"data": [JOB]}).encode())
        else:
            self.send(200, json.dumps(JOB).encode())

    do_GET = do_POST = answer

    def send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.asked = []
    made = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    thread.join()
    made.server_close()


def test_create_uploads_asks_and_watches(server: str, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    given = ["create", str(data), "--name", "a", "-o", "r=4", "-o", "method=ia3", "--seed", "3", "--server", server]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "ftjob-1", "Step 1  loss 0.5  tokens_per_second 100", "The job has successfully completed.", "succeeded: a",
    ]  # fmt: skip
    asked = {what: body for what, _, body in Handler.asked}
    wanted = json.loads(asked["POST /v1/fine_tuning/jobs"])
    assert wanted["hyperparameters"] == {"r": 4, "method": "ia3"}
    assert (wanted["training_file"], wanted["suffix"], wanted["seed"]) == ("file-1", "a", 3)


def test_list_and_changes(server: str) -> None:
    runner = CliRunner()
    assert "ftjob-1" in runner.invoke(app, ["list", "--server", server]).output
    for change in ("cancel", "pause", "resume"):
        assert runner.invoke(app, [change, "ftjob-1", "--server", server]).output == "succeeded\n"
    assert [what for what, _, _ in Handler.asked][1:] == [
        f"POST /v1/fine_tuning/jobs/ftjob-1/{change}" for change in ("cancel", "pause", "resume")
    ]


def test_a_bad_option_is_told(server: str, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")
    result = CliRunner().invoke(app, ["create", str(data), "--name", "a", "-o", "rank", "--server", server])
    assert isinstance(result.exception, InvalidRequest) and "NAME=VALUE" in result.exception.message


def test_the_key_is_the_environments(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPLEX_API_KEY", "adx_k")
    call(server, "GET", "/v1/models")
    assert Handler.asked[-1][1] == "Bearer adx_k"
    monkeypatch.setenv("ADAPLEX_API_KEY", "wrong")
    with pytest.raises(AdaplexError, match="not a key; set ADAPLEX_API_KEY"):
        call(server, "GET", "/v1/models")
