"""A client that goes away frees its rows at once, at every moment of an answer."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import orjson
import pytest

from adaplex_server.http_api.settings import HttpSettings

PATHS = ["/v1/chat/completions", "/v1/completions"]


def _connect(address: str) -> socket.socket:
    parts = urlsplit(address)
    return socket.create_connection((parts.hostname, parts.port), timeout=10)


def _post(address: str, path: str, body: dict[str, Any]) -> socket.socket:
    raw = orjson.dumps(body)
    connection = _connect(address)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
    connection.sendall(head.encode() + raw)
    return connection


def _until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def _body(path: str, model: str, stream: bool) -> dict[str, Any]:
    prompt = {"prompt": ["a", "b", "c"], "max_tokens": 2000} if path == PATHS[1] else {}
    if not prompt:
        prompt = {"messages": [{"role": "user", "content": "hi"}], "n": 2}
    return {"model": model, "stream": stream, **prompt}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["silent", "slow"])
def test_hang_up(address: str, service: Any, path: str, stream: bool, model: str) -> None:
    """Before the first token (silent) and in the middle (slow)."""
    connection = _post(address, path, _body(path, model, stream))
    _until(lambda: bool(service.running), "the request never ran")
    if stream and model == "slow":
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    connection.close()
    _until(lambda: not service.running, "the rows still run")


def test_fifty_hang_ups_leave_nothing_and_others_are_untouched(address: str, service: Any, client: Any) -> None:
    body = _body(PATHS[0], "slow", True)
    connections = [_post(address, PATHS[0], body) for _ in range(50)]
    stream = client.chat.completions.create(
        model="slow", messages=[{"role": "user", "content": "other"}], max_tokens=60, stream=True
    )
    first = next(iter(stream))
    _until(lambda: len(service.running) == 51, "not all requests ran")
    for i, connection in enumerate(connections):
        if i % 2:  # as a killed client does: a reset, not an orderly end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        connection.close()
    _until(lambda: len(service.running) <= 1, "rows still run")
    said = first.choices[0].delta.content + "".join(c.choices[0].delta.content or "" for c in stream)
    assert said == ("[slow|<user>other|0]" * 100)[:60]


def test_patience_opens_the_stream_and_pings(service: Any, serve: Any) -> None:
    """In a long queue the client sees a sign of life, and can still hang up."""
    settings = HttpSettings(first_byte_patience=0.05, ping=0.05)
    with serve(service, settings) as address:
        connection = _post(address, PATHS[0], _body(PATHS[0], "silent", True))
        seen = b""
        while seen.count(b": ping") < 2:
            seen += connection.recv(1000)
        assert seen.startswith(b"HTTP/1.1 200")
        connection.close()
        _until(lambda: not service.running, "the row still runs")


def test_a_reader_that_stalls_is_dropped(service: Any, serve: Any) -> None:
    """Its row must not be held for ever by a full socket."""
    settings = HttpSettings(stall=0.2)
    with serve(service, settings) as address:
        parts = urlsplit(address)
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((parts.hostname, parts.port))
        prompt = "p" * 2000
        raw = orjson.dumps({"model": "alpha", "stream": True, "n": 64, "prompt": [prompt] * 16, "max_tokens": 2000})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
        connection.sendall(head.encode() + raw)
        _until(lambda: bool(service.running), "the request never ran")
        _until(lambda: not service.running, "the rows still run")
        connection.close()


def test_a_body_that_stops_arriving(service: Any, serve: Any) -> None:
    with serve(service, HttpSettings(body_idle=0.1)) as address:
        connection = _connect(address)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
        connection.close()


def test_a_head_that_never_comes(service: Any, serve: Any) -> None:
    with serve(service, HttpSettings(header=0.2)) as address:
        silent, slow = _connect(address), _connect(address)
        slow.sendall(b"GET /health HTTP/1.1\r\nX-A: ")
        assert silent.recv(100) == b""
        assert slow.recv(100) == b""
        silent.close()
        slow.close()


def test_a_head_that_never_ends(address: str) -> None:
    connection = _connect(address)
    connection.sendall(b"GET /health HTTP/1.1\r\n" + b"X-A: " + b"a" * 100_000 + b"\r\n")
    answer = connection.recv(2000)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'{"error":' in answer
    connection.close()


def test_pipelined_requests_are_answered_in_order(address: str) -> None:
    connection = _connect(address)
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
    seen = b""
    while seen.count(b"HTTP/1.1 ") < 2 or b'"not_found"' not in seen:
        seen += connection.recv(4000)
    assert seen.index(b"HTTP/1.1 200") < seen.index(b"HTTP/1.1 404")
    connection.close()
