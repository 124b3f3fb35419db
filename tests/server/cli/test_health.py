from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from adaplex_adapters.errors import Unavailable
from adaplex_server.cli.health import check_health
from adaplex_server.settings import ServerSettings


@contextmanager
def answering(status: int, body: bytes) -> Iterator[ServerSettings]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield ServerSettings(http=f"0.0.0.0:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_well_server_is_well() -> None:
    with answering(200, b'{"status": "ok", "state": "ready", "detail": ""}') as settings:
        assert check_health(settings, "/health", 5) == "ready"


def test_a_failed_server_tells_why() -> None:
    with (
        answering(503, b'{"status": "unavailable", "state": "failed", "detail": "no memory"}') as settings,
        pytest.raises(Unavailable, match="failed: no memory"),
    ):
        check_health(settings, "/health", 5)


def test_no_server_and_another_program_are_not_well() -> None:
    with answering(200, b"<html>") as settings, pytest.raises(Unavailable, match="no healthy server"):
        check_health(settings, "/health", 5)
    with pytest.raises(Unavailable, match="no healthy server"):
        check_health(settings, "/health", 5)
