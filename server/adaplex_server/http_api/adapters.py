"""/v1/adapters: upload, compose, list, describe, delete."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from adaplex_adapters.names import check_name
from adaplex_server.http_api.body import read_model
from adaplex_server.http_api.context import context_of
from adaplex_server.http_api.operation import Operation, json_response
from adaplex_server.http_api.schemas.inventory import (
    Adapter,
    AdapterDeleted,
    AdapterList,
    AdapterOrigin,
    AdapterPart,
    ComposeRequest,
)
from adaplex_server.http_api.settings import HttpSettings
from adaplex_server.http_api.upload import receive_upload
from adaplex_server.service.composed_name import NamedPart
from adaplex_server.service.service import Service
from adaplex_server.service.training.types import Origin
from adaplex_server.service.types import AdapterInfo

_CREATE: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["name", "files"],
                "properties": {
                    "name": {"type": "string", "description": "What requests will call it."},
                    "files": {
                        "type": "array",
                        "items": {"type": "string", "contentMediaType": "application/octet-stream"},
                        "description": "The files of a PEFT folder, or one archive of it (zip, tar, tar.gz).",
                    },
                },
            }
        },
        "application/json": ComposeRequest,
    },
}


class Adapters:
    """The registered adapters, as resources."""

    def __init__(self, service: Service, settings: HttpSettings) -> None:
        self._service = service
        self._settings = settings

    def operations(self) -> tuple[Operation, ...]:
        """What is served here."""
        many, one = "/v1/adapters", "/v1/adapters/{name:path}"
        return (
            Operation(method="GET", path=many, handler=self.list_all, summary="List adapters", answer=AdapterList),
            Operation(
                method="POST",
                path=many,
                handler=self.create,
                summary="Upload an adapter or a new revision of one, or compose one of others",
                body=_CREATE,
                answer=Adapter,
                status=201,
                errors=(400, 404, 409, 413, 503, 507),
            ),
            Operation(
                method="GET",
                path=one,
                handler=self.describe,
                summary="Describe an adapter",
                answer=Adapter,
                errors=(404,),
            ),
            Operation(
                method="DELETE",
                path=one,
                handler=self.delete,
                summary="Unload and forget an adapter",
                answer=AdapterDeleted,
                errors=(404, 409),
            ),
        )

    async def list_all(self, request: Request) -> Response:
        """All of them, those that cannot be served now included."""
        caller = context_of(request.scope).caller
        return json_response(
            AdapterList([_told(one) for one in self._service.registry.list() if caller.may_name(one.name)])
        )

    async def describe(self, request: Request) -> Response:
        """One of them."""
        info = self._service.registry.describe(self._name(request))
        origin = self._service.training.origin(info.revision) if info.source == "trainer" else None
        return json_response(_told(info, origin))

    async def create(self, request: Request) -> Response:
        """Answered when the adapter is proved and durable. Once all bytes are here, the client may leave."""
        is_json = request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"
        info = await (self._compose(request) if is_json else self._upload(request))
        response = json_response(_told(info), 201)
        response.headers["Location"] = f"/v1/adapters/{info.name}"
        return response

    async def _compose(self, request: Request) -> AdapterInfo:
        limits, context = self._settings, context_of(request.scope)
        body = await read_model(request, ComposeRequest, limits.max_body_bytes, limits.body_idle)
        context.model = body.name
        check_name(body.name)
        for name in (body.name, *(part.adapter for part in body.compose)):
            self._service.gate.check_name(context.caller, name)
        return await self._service.registry.compose(
            body.name, [NamedPart(part.adapter, part.weight) for part in body.compose]
        )

    async def _upload(self, request: Request) -> AdapterInfo:
        registry = self._service.registry
        with registry.staging() as staging:
            received = await receive_upload(request, staging, self._settings)
            context_of(request.scope).model = received.name
            check_name(received.name)
            self._service.gate.check_name(context_of(request.scope).caller, received.name)
            return await registry.upload(received.name, received.folder)

    async def delete(self, request: Request) -> Response:
        """Answered when no later request can reach it and nothing of it would come back after a restart."""
        name = self._name(request)
        await self._service.registry.unload(name)
        return json_response(AdapterDeleted(name))

    def _name(self, request: Request) -> str:
        """Whom the path names, if the caller's key covers it."""
        name: str = request.path_params["name"]
        self._service.gate.check_name(context_of(request.scope).caller, name)
        return name


def _told(info: AdapterInfo, origin: Origin | None = None) -> Adapter:
    return Adapter(
        name=info.name,
        revision=info.revision,
        kind=info.kind,
        rank=info.rank,
        targets=list(info.targets),
        size=info.nbytes,
        parameters=info.parameters,
        base_model=info.base_model,
        source=info.source,
        created=int(info.created),
        state=info.state,
        running=info.running,
        reason=info.reason,
        virtual_tokens=info.virtual_tokens,
        bottleneck_size=info.bottleneck_size,
        parts=[AdapterPart(part.name, part.weight, part.revision) for part in info.parts],
        origin=None if origin is None else AdapterOrigin(origin.job, origin.file, origin.file_digest, origin.base),
    )
