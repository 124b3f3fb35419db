"""One HTTP request on its way from the gateway to a replica, and the answer on its way back, as ASGI messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message

AHEAD = 256
"""Messages that an answer may be ahead of its reader; then the application waits, as it would for a full socket."""


@dataclass(frozen=True)
class Forwarded:
    """A request whose body has arrived. headers, query: as ASGI has them. client: address and port."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    client: tuple[str, int] | None
    body: bytes

    @classmethod
    def of(cls, request: Request, path: str, body: bytes) -> Forwarded:
        """The request that the gateway got; path is without the application's route prefix."""
        scope = request.scope
        client = tuple(scope["client"]) if scope.get("client") else None
        headers = tuple((bytes(name), bytes(value)) for name, value in scope["headers"])
        return cls(scope["method"], path, scope.get("query_string", b""), headers, client, body)

    def scope(self) -> dict[str, Any]:
        """The ASGI scope of an HTTP request."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "scheme": "http",
            "method": self.method,
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": self.query,
            "headers": [(name.lower(), value) for name, value in self.headers],
            "client": self.client,
            "server": None,
            "state": {},
        }


async def answer(app: ASGIApp, request: Forwarded) -> AsyncGenerator[tuple[Message, ...], None]:
    """The ASGI messages of the answer as they come, those that are ready together in one tuple.

    Closing the generator tells the application that the client has left and ends it. What it raises is raised here.
    """
    outgoing: asyncio.Queue[Message | None] = asyncio.Queue(AHEAD)
    gone = asyncio.Event()
    bodies = iter([request.body])

    async def receive() -> Message:
        for body in bodies:
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def serve() -> None:
        try:
            await app(request.scope(), receive, outgoing.put)
        finally:
            if not gone.is_set():
                await outgoing.put(None)

    task = asyncio.create_task(serve())
    try:
        while (message := await outgoing.get()) is not None:
            ready, ended = [message], False
            while not outgoing.empty() and not ended:
                more = outgoing.get_nowait()
                ended = more is None
                ready += [] if more is None else [more]
            yield tuple(ready)
            if ended:
                break
        await task
    finally:
        gone.set()
        task.cancel()
        await asyncio.wait({task})
