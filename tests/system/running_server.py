"""Starts the real server as a user would, on free ports and in folders of its own."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class RunningServer:
    process: subprocess.Popen[bytes]
    http: str
    grpc: str
    data: Path
    log: Path

    def engine_stat(self, name: str) -> float:
        """One unlabelled figure of /metrics."""
        for line in httpx.get(f"{self.http}/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[1])
        raise AssertionError(f"/metrics has no {name}")

    def wait_for(self, name: str, value: float, seconds: float = 10) -> None:
        """Until a figure of /metrics has this value."""
        limit = time.monotonic() + seconds
        while self.engine_stat(name) != value:
            assert time.monotonic() < limit, f"{name} is {self.engine_stat(name)}, not {value}"
            time.sleep(0.05)


def command(http: int, grpc: int, data: Path, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "adaplex_server", "serve"),
        *("--http", f"127.0.0.1:{http}", "--grpc", f"127.0.0.1:{grpc}", "--data-dir", str(data)),
        *options,
    ]


@contextmanager
def running_server(folder: Path, *options: str) -> Iterator[RunningServer]:
    """A server that is ready; it is ended with SIGTERM, and must then exit with 0."""
    http, grpc = free_port(), free_port()
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command(http, grpc, folder / "data", *options), stdout=output, stderr=output)
    server = RunningServer(process, f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}", folder / "data", log)
    try:
        wait_until_ready(server)
        yield server
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def wait_until_ready(server: RunningServer, seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        assert server.process.poll() is None, server.log.read_text()
        try:
            if httpx.get(f"{server.http}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"not ready after {seconds} s:\n{server.log.read_text()}")
