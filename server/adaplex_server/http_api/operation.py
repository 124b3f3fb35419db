"""One HTTP operation: what serves it and what /openapi.json says of it. Routes and document come from the same list."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from adaplex_adapters.errors import PermissionDenied
from adaplex_server.http_api.context import context_of
from adaplex_server.service.access.gate import Gate

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """method and path (Starlette's syntax). body: schema of a JSON body, or a whole OpenAPI
    requestBody, in whose content a schema may stand for a JSON body.

    answer: struct of the JSON answer, or the media type of another one. event: struct of a streamed event, where
    `stream: true` is possible. errors: statuses that the document lists.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    answer: type[msgspec.Struct] | str
    status: int = 200
    body: type[BaseModel] | dict[str, Any] | None = None
    event: type[msgspec.Struct] | None = None
    errors: tuple[int, ...] = ()


def json_response(answer: msgspec.Struct, status: int = 200) -> Response:
    """An answer as JSON."""
    return Response(msgspec.json.encode(answer), status_code=status, media_type="application/json")


def routes(operations: Sequence[Operation], gate: Gate) -> list[Route]:
    """One route a path, so that 405 lists every method that it has. Nothing is served that the gate does not allow."""
    paths: dict[str, dict[str, Handler]] = {}
    for one in operations:
        methods = paths.setdefault(one.path, {})
        assert one.method not in methods, f"{one.method} {one.path} is there twice"
        methods[one.method] = one.handler
    return [Route(path, _by_method(path, handlers, gate), methods=list(handlers)) for path, handlers in paths.items()]


def _by_method(path: str, handlers: dict[str, Handler], gate: Gate) -> Handler:
    async def endpoint(request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        # A browser says so when a page of another site makes it ask: what it uploads to a server on its user's own
        # machine would need no key and no answer.
        if method != "GET" and request.headers.get("sec-fetch-site") == "cross-site":
            raise PermissionDenied("a page of another site cannot change or ask anything here")
        context_of(request.scope).caller = gate.allow(f"{method} {path}", request.headers.get("authorization"))
        return await handlers[method](request)

    return endpoint
