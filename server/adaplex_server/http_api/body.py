"""Reads a request's body within its limits, and parses JSON into a checked schema."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.types import Receive

from adaplex_adapters.errors import Cancelled, InvalidRequest, RequestTooLarge
from adaplex_server.http_api.refusals import refusal

Model = TypeVar("Model", bound=BaseModel)


async def limited_body(request: Request, limit: int, idle: float, what: str = "body") -> AsyncIterator[bytes]:
    """The body as it arrives; RequestTooLarge as soon as it is known to be over `limit` bytes, chunked or not.

    Raises Cancelled if the client leaves, InvalidRequest after `idle` silent seconds.
    """
    too_large = RequestTooLarge(f"The {what} is larger than {limit} bytes, which is the most this server takes.")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    size = 0
    async for chunk in _chunks(request.receive, idle):
        size += len(chunk)
        if size > limit:
            raise too_large
        yield chunk


async def _chunks(receive: Receive, idle: float) -> AsyncIterator[bytes]:
    while True:
        try:
            async with asyncio.timeout(idle):
                message = await receive()
        except TimeoutError:
            raise InvalidRequest(f"The body stopped arriving for {idle:g} seconds; send it without pauses.") from None
        if message["type"] == "http.disconnect":
            raise Cancelled("The client went away while sending the body.")
        if message.get("body"):
            yield message["body"]
        if not message.get("more_body", False):
            return


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object. NaN, 1e999, lone surrogates, bad UTF-8 and deep nesting are refused by the parser itself."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.")
    return value


async def read_model(request: Request, schema: type[Model], limit: int, idle: float) -> Model:
    """The body, checked against `schema`; InvalidRequest names the first field that is wrong."""
    value = parse_json(b"".join([chunk async for chunk in limited_body(request, limit, idle)]))
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise refusal(error, schema) from None
