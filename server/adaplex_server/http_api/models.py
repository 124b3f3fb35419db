"""/v1/models: what a request's `model` may name."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from adaplex_adapters.errors import Conflict, ModelNotFound
from adaplex_server.caller import Caller
from adaplex_server.http_api.context import context_of
from adaplex_server.http_api.operation import Operation, json_response
from adaplex_server.http_api.schemas.inventory import Model, ModelDeleted, ModelList
from adaplex_server.service.service import Service
from adaplex_server.service.types import AdapterInfo


class Models:
    """The base and the adapters that can be served now."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def operations(self) -> tuple[Operation, ...]:
        """What is served here."""
        one = "/v1/models/{model:path}"
        return (
            Operation(
                method="GET",
                path="/v1/models",
                handler=self.list_all,
                summary="List the base and adapters",
                answer=ModelList,
            ),
            Operation(
                method="GET",
                path=one,
                handler=self.describe,
                summary="Describe the base or an adapter",
                answer=Model,
                errors=(404,),
            ),
            Operation(
                method="DELETE",
                path=one,
                handler=self.delete,
                summary="Unload and forget an adapter",
                answer=ModelDeleted,
                errors=(404, 409),
            ),
        )

    async def list_all(self, request: Request) -> Response:
        """The base first, then its aliases, then adapters."""
        return json_response(ModelList(self._models(context_of(request.scope).caller)))

    async def describe(self, request: Request) -> Response:
        """One of them, by name."""
        name = request.path_params["model"]
        caller = context_of(request.scope).caller
        self._service.gate.check_name(caller, name)
        found = next((one for one in self._models(caller) if one.id == name), None)
        if found is None:
            self._service.registry.describe(name)  # raises with the list of names
            raise ModelNotFound(
                f"The adapter '{name[:100]}' cannot be served now; GET /v1/adapters says why.", param="model"
            )
        return json_response(found)

    async def delete(self, request: Request) -> Response:
        """Unload an adapter, as OpenAI's clients delete a fine-tuned model."""
        name = request.path_params["model"]
        self._service.gate.check_name(context_of(request.scope).caller, name)
        info = self._service.info()
        if name in (info.base, *info.aliases):
            raise Conflict(f"'{name[:100]}' is the base of this server and cannot be deleted.", param="model")
        await self._service.registry.unload(name)
        return json_response(ModelDeleted(name))

    def _models(self, caller: Caller) -> list[Model]:
        info = self._service.info()
        length = info.engine.max_context if info.engine else None
        bases = [Model(name, int(info.started), info.base, None, length) for name in (info.base, *info.aliases)]
        adapters = [_adapter(one, info.base, length) for one in self._service.registry.list() if one.servable]
        return [one for one in bases + adapters if caller.may_name(one.id)]


def _adapter(one: AdapterInfo, base: str, length: int | None) -> Model:
    return Model(one.name, int(one.created), base, base, length, revision=one.revision)
