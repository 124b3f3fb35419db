"""The error tree as HTTP: OpenAI's error object, its status and headers. Nothing else here decides a status."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from adaplex_adapters.errors import AdaplexError, MethodNotAllowed, NotFound
from adaplex_server.http_api.context import context_of


class ErrorDetail(msgspec.Struct, frozen=True):
    """What was wrong: `param` is the path of the field in the request, where one is to blame."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(msgspec.Struct, frozen=True):
    """The body of every answer that is not a success."""

    error: ErrorDetail


def error_bytes(error: AdaplexError) -> bytes:
    """The JSON body that tells `error`."""
    detail = ErrorDetail(message=error.message, type=error.type, param=error.param, code=error.code)
    return msgspec.json.encode(ErrorAnswer(detail))


def error_response(error: AdaplexError, headers: Mapping[str, str] | None = None) -> Response:
    """The whole answer. 429 and 503 always say when to come back."""
    out = dict(headers or {})
    retry_after = error.retry_after
    if retry_after is None and error.status in (429, 503):
        retry_after = 1.0
    if retry_after is not None:
        out["Retry-After"] = str(max(1, math.ceil(retry_after)))
    if error.status == 401:
        out["WWW-Authenticate"] = "Bearer"
    return Response(error_bytes(error), status_code=error.status, headers=out, media_type="application/json")


async def answer_adaplex_error(request: Request, error: Exception) -> Response:
    """Exception handler for the error tree."""
    assert isinstance(error, AdaplexError)
    context_of(request.scope).outcome = error.code
    return error_response(error)


async def answer_routing_error(request: Request, error: Exception) -> Response:
    """Exception handler for what the router raises: an unknown path or method."""
    assert isinstance(error, HTTPException)
    told: AdaplexError
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        told = MethodNotAllowed(f"{request.method} is not possible on {_short(request.url.path)}; allowed: {allowed}.")
    else:
        told = NotFound(
            f"There is no {request.method} {_short(request.url.path)} here; GET /openapi.json lists what there is."
        )
    context_of(request.scope).outcome = told.code
    return error_response(told, error.headers)


def _short(path: str) -> str:
    return path if len(path) <= 100 else path[:100] + "..."
