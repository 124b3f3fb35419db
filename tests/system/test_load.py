"""A server with few rows under more than it can do: adapters take turns, time limits hold, and answers stay right."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from running_server import RunningServer, running_server


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("small"), "--max-rows", "2", "--max-wait", "0") as server:
        yield server


def body(model: str, tokens: int) -> dict[str, object]:
    return {"model": model, "prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True, "temperature": 0}


@pytest.mark.slow
def test_a_flood_of_one_adapter_does_not_starve_another(small: RunningServer) -> None:
    """50 requests of one adapter wait for two places; one of another has the first that comes free."""
    ended: list[float] = []

    def flood() -> None:
        httpx.post(f"{small.http}/v1/completions", json=body("itn-en", 5), timeout=120).raise_for_status()
        ended.append(time.monotonic())

    threads = [threading.Thread(target=flood) for _ in range(50)]
    for thread in threads:
        thread.start()
    limit = time.monotonic() + 30
    while small.engine_stat("adaplex_requests_waiting") < 30 and time.monotonic() < limit:
        time.sleep(0.02)
    before = len(ended)
    httpx.post(f"{small.http}/v1/completions", json=body("date-iso", 1), timeout=120).raise_for_status()
    meanwhile = len(ended) - before
    for thread in threads:
        thread.join(120)
    assert len(ended) == 50 and meanwhile <= 6, f"{meanwhile} of the flood ended first"


@pytest.mark.slow
def test_a_time_limit_holds_while_an_answer_is_made(small: RunningServer) -> None:
    began = time.monotonic()
    headers = {"X-Request-Timeout": "0.5"}
    answer = httpx.post(f"{small.http}/v1/completions", json=body("itn-en", 2000), headers=headers, timeout=60)
    assert answer.status_code == 504 and time.monotonic() - began < 10
    small.wait_for("adaplex_kv_pages_used", 0)


@pytest.mark.slow
def test_the_generator_finds_no_wrong_answer_while_adapters_change(small: RunningServer, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    options = ("--rate", "3", "--seconds", "4", "--prompt", "8", "--output", "4", "--churn-every", "0.7")
    command = [sys.executable, "-m", "adaplex_loadtest", "run", "--url", small.http, "--grpc", small.grpc, *options]
    done = subprocess.run([*command, "--html", str(page)], capture_output=True, text=True, timeout=120, check=True)
    told = json.loads(done.stdout.splitlines()[0])
    assert told["answered"] > 0 and told["checked_against"] > 0 and told["churn"]["uploads"] > 3
    assert set(told["errors"]) <= {"HTTP 404", "gRPC NOT_FOUND"}
    assert page.read_text().count("<svg") == 3
