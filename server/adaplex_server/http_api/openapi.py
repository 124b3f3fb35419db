"""/openapi.json, made from the same operations as the routes and from the schemas that check and write the bodies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import msgspec
import orjson
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from adaplex_server.http_api.errors import ErrorAnswer
from adaplex_server.http_api.operation import Operation
from adaplex_server.http_api.time_limit import DESCRIPTION, HEADER

_REF = "#/components/schemas/{}"
_PHRASES = {
    400: "The request cannot be served as written",
    404: "Nothing of that name is here",
    409: "The state does not allow it now",
    413: "The body is too large",
    429: "A queue is full, the wait would be too long, or a limit is reached; Retry-After says when to come back",
    500: "This row failed, or a bug",
    503: "Not ready; Retry-After says when to come back",
    504: "The request's time ran out",
    507: "The disk refused",
}


class Document:
    """The OpenAPI 3.1 document, made once."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self._body = orjson.dumps(describe([*operations, *self.operations()]))

    def operations(self) -> tuple[Operation, ...]:
        """What is served here: the document, which lists itself."""
        return (
            Operation(
                method="GET",
                path="/openapi.json",
                handler=self.get,
                summary="This document",
                answer="application/json",
            ),
        )

    async def get(self, request: Request) -> Response:
        """The document."""
        return Response(self._body, media_type="application/json")


def describe(operations: Sequence[Operation]) -> dict[str, Any]:
    """The whole document as JSON values."""
    bodies = [kind for one in operations for kind in _contents(one.body).values() if isinstance(kind, type)]
    _, definitions = models_json_schema([(one, "validation") for one in bodies], ref_template=_REF.format("{model}"))
    structs = {one for op in operations for one in (op.answer, op.event) if isinstance(one, type)} | {ErrorAnswer}
    ordered = sorted(structs, key=lambda one: one.__name__)
    _, answers = msgspec.json.schema_components(ordered, ref_template=_REF.format("{name}"))
    paths: dict[str, dict[str, Any]] = {}
    for one in operations:
        path = re.sub(r"{(\w+):\w+}", r"{\1}", one.path)
        paths.setdefault(path, {})[one.method.lower()] = _operation(one, path)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Adaplex",
            "version": version("adaplex"),
            "description": "Many fine-tuned adapters from one frozen, quantized base; `model` names the adapter.",
        },
        "paths": paths,
        "components": {"schemas": {**definitions.get("$defs", {}), **answers}},
    }


def _operation(one: Operation, path: str) -> dict[str, Any]:
    content = {"application/json": _schema(one.answer)} if isinstance(one.answer, type) else {one.answer: {}}
    if one.event is not None:
        content["text/event-stream"] = {"schema": {"type": "string", "description": _events(one.event)}}
    told: dict[str, Any] = {
        "operationId": f"{one.handler.__qualname__.replace('.', '_')}",
        "summary": one.summary,
        "responses": {
            str(one.status): {"description": "As asked", "content": content},
            **{str(status): _error(status) for status in one.errors},
        },
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", path)
    ]
    if 504 in one.errors:
        seconds = {"type": "number", "exclusiveMinimum": 0}
        parameters.append({"name": HEADER, "in": "header", "description": DESCRIPTION, "schema": seconds})
    if parameters:
        told["parameters"] = parameters
    if one.body is not None:
        content = {
            media: _schema(kind) if isinstance(kind, type) else kind for media, kind in _contents(one.body).items()
        }
        told["requestBody"] = {"required": True, "content": content}
    return told


def _contents(body: type[BaseModel] | dict[str, Any] | None) -> dict[str, Any]:
    """What may be sent, by media type: a schema's type, or OpenAPI's own words."""
    if body is None:
        return {}
    return body["content"] if isinstance(body, dict) else {"application/json": body}


def _schema(kind: type[BaseModel] | type[msgspec.Struct]) -> dict[str, Any]:
    return {"schema": {"$ref": _REF.format(kind.__name__)}}


def _events(kind: type[msgspec.Struct]) -> str:
    return f"With stream: true. Each event's data is a {kind.__name__}; the last is [DONE] or an ErrorAnswer."


def _error(status: int) -> dict[str, Any]:
    return {"description": _PHRASES[status], "content": {"application/json": _schema(ErrorAnswer)}}
