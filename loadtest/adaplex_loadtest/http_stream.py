"""One streamed request over HTTP, on a connection of its own, read line by line.

A full HTTP client would cost more than the server, and the generator would measure itself.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any
from urllib.parse import urlsplit

import orjson

from adaplex_loadtest.answered import Answered


async def stream(
    url: str, path: str, body: dict[str, Any], told: Answered, timeout: float | None, hang_up: float | None = None
) -> None:
    """Send the request and fill in `told`. timeout: sent as X-Request-Timeout. hang_up: seconds after which the client
    goes away.
    """
    began = time.perf_counter()
    try:
        async with asyncio.timeout(hang_up):
            await _exchange(url, path, body, told, timeout, began)
    except TimeoutError:
        told.error = "hung up"
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        told.error = type(error).__name__
    told.seconds = time.perf_counter() - began


async def _exchange(
    url: str, path: str, body: dict[str, Any], told: Answered, timeout: float | None, began: float
) -> None:
    address = urlsplit(url)
    payload = orjson.dumps({**body, "stream": True, "stream_options": {"include_usage": True}})
    limit = "" if timeout is None else f"X-Request-Timeout: {timeout:.3f}\r\n"
    reader, writer = await asyncio.open_connection(address.hostname, address.port or 80)
    try:
        head = f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n{limit}"
        writer.write(f"{head}Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode() + payload)
        status = (await reader.readline()).split()
        if status[1:2] != [b"200"]:
            told.error = f"HTTP {b''.join(status[1:2]).decode() or 'nothing'}"
            await _read_hint(reader, told)
            return
        await _read_events(reader, told, began)
    finally:
        writer.close()


async def _read_hint(reader: asyncio.StreamReader, told: Answered) -> None:
    while (line := await reader.readline()).strip():
        name, _, value = line.partition(b":")
        if name.lower() == b"retry-after":
            told.retry_after = float(value)


async def _read_events(reader: asyncio.StreamReader, told: Answered, began: float) -> None:
    """Lines of the chunked body that begin with "data: {"; the server writes an event in one piece."""
    last, finished = began, False
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        event = orjson.loads(line[6:])
        if "error" in event:
            told.error = str(event["error"].get("code") or event["error"].get("type"))
            return
        if usage := event.get("usage"):
            told.tokens, finished = usage["completion_tokens"], True
            continue
        (choice,) = event["choices"]
        text = choice["delta"].get("content") if "delta" in choice else choice["text"]
        if not text:
            continue
        now = time.perf_counter()
        told.text += text
        if told.first_token is None:
            told.first_token = now - began
        else:
            told.gaps.append(now - last)
        last = now
    if not finished:
        told.error = "ended early"
