from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from adaplex_server.ray_serve.forwarded import AHEAD, Forwarded, answer

REQUEST = Forwarded("POST", "/v1/x", b"a=1", ((b"Content-Type", b"text/plain"),), ("10.0.0.1", 5), b"body")


async def collect(app: object) -> list[Message]:
    return [message async for batch in answer(app, REQUEST) for message in batch]  # type: ignore[arg-type]


async def test_the_application_sees_the_request_as_it_was() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        head = [request.method, request.url.path, request.url.query, request.headers["content-type"]]
        assert [*head, request.client.host if request.client else None] == [
            *("POST", "/v1/x", "a=1", "text/plain", "10.0.0.1")
        ]
        await send({"type": "http.response.body", "body": await request.body()})

    assert await collect(app) == [{"type": "http.response.body", "body": b"body"}]


async def test_all_messages_arrive_in_order_however_many_there_are() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for i in range(5 * AHEAD):
            await send({"type": "http.response.body", "body": str(i).encode()})
            if i % 100 == 0:
                await asyncio.sleep(0)

    assert [int(message["body"]) for message in await collect(app)] == list(range(5 * AHEAD))


async def test_a_message_is_not_kept_until_the_next_one() -> None:
    taken = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start"})
        await taken.wait()
        await send({"type": "http.response.body"})

    async with aclosing(answer(app, REQUEST)) as messages:
        assert await anext(messages) == ({"type": "http.response.start"},)
        taken.set()
        assert await anext(messages) == ({"type": "http.response.body"},)


async def test_closing_ends_the_application() -> None:
    ended: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            while True:
                await send({"type": "http.response.body"})
        finally:
            ended.append("yes")

    async with aclosing(answer(app, REQUEST)) as messages:
        await anext(messages)
    assert ended == ["yes"]


async def test_what_the_application_raises_is_raised() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start"})
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        await collect(app)
