"""The real server under the benchmark, hang-ups, a killed engine, and signals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import httpx
from running_server import RunningServer, running_server, wait_until_ready

from adaplex_loadtest import serve_bench

MODELS = ("smollm2-135m-instruct", "itn-en", "date-iso", "tsql-postgres")


def stream_body(model: str = MODELS[0], max_tokens: int = 2000) -> dict[str, object]:
    return {
        "model": model,
        "prompt": "Once upon a time",
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }


def test_the_benchmark_of_serving_reports_what_it_asked_for(server: RunningServer) -> None:
    load = serve_bench.Load(server.http, MODELS, streams=4, requests=8, prompt_words=4, output_tokens=4)
    figures = json.loads(asyncio.run(serve_bench.run(load)))
    assert figures["errors"] == {}
    assert figures["models"] == 4
    server.wait_for("adaplex_requests_running", 0)


def test_a_client_that_hangs_up_frees_its_row_and_pages(server: RunningServer) -> None:
    with httpx.stream("POST", f"{server.http}/v1/completions", json=stream_body(), timeout=60) as answer:
        lines = answer.iter_lines()  # kept: letting go of it would hang up
        next(lines)
        server.wait_for("adaplex_requests_running", 1)
    server.wait_for("adaplex_requests_running", 0, seconds=5)
    server.wait_for("adaplex_kv_pages_used", 0, seconds=5)


def test_a_client_that_hangs_up_before_the_first_byte_frees_its_row(server: RunningServer) -> None:
    body = stream_body() | {"stream": False}
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(f"{server.http}/v1/completions", json=body, timeout=0.5)
    server.wait_for("adaplex_requests_running", 0, seconds=5)


def engine_pid(server: RunningServer) -> int:
    """The engine is the one child of the API process that runs a module of ours."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    (pid,) = [int(c) for c in children if b"adaplex_server.engine" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return pid


def test_a_killed_engine_is_told_and_started_again(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        lost = engine_pid(server)
        seen: list[str] = []

        def read() -> None:
            with httpx.stream(
                "POST", f"{server.http}/v1/completions", json=stream_body("itn-en"), timeout=60
            ) as answer:
                seen.extend(line for line in answer.iter_lines() if line)

        reader = threading.Thread(target=read)
        reader.start()
        server.wait_for("adaplex_requests_running", 1)
        os.kill(lost, signal.SIGKILL)
        reader.join(30)
        error = json.loads(seen[-1].removeprefix("data: "))["error"]
        assert error["code"] == "unavailable", "the stream ends with an error that says: try again"
        wait_until_ready(server)
        assert engine_pid(server) != lost
        body = stream_body("itn-en", max_tokens=4) | {"stream": False}
        answer = httpx.post(f"{server.http}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 4


def test_an_engine_whose_server_is_killed_ends(tmp_path: Path) -> None:
    outlived = True
    # Leaving the context complains that the server did not exit with 0: it was killed.
    with contextlib.suppress(AssertionError), running_server(tmp_path) as server:
        engine = engine_pid(server)
        server.process.kill()
        limit = time.monotonic() + 10
        while outlived and time.monotonic() < limit:
            time.sleep(0.05)
            outlived = process_is_there(engine)
    assert not outlived, "the engine outlived its server, or the server could not be started"


def process_is_there(pid: int) -> bool:
    """Whether it runs: one that ended but was not waited for has no command line any more."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except FileNotFoundError:
        return False


def test_sigterm_drains_and_refuses_new_work(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        finished: list[str] = []

        def read() -> None:
            body = stream_body(max_tokens=60)
            with httpx.stream("POST", f"{server.http}/v1/completions", json=body, timeout=60) as answer:
                finished.extend(line for line in answer.iter_lines() if line)

        reader = threading.Thread(target=read)
        reader.start()
        server.wait_for("adaplex_requests_running", 1)
        server.process.send_signal(signal.SIGTERM)
        refused = httpx.post(f"{server.http}/v1/completions", json=stream_body(), timeout=10)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        reader.join(60)
        assert finished[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in "".join(finished)
        assert server.process.wait(60) == 0
