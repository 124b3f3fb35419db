"""/v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM's clients and controllers call them."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from adaplex_adapters.errors import InvalidRequest
from adaplex_server.http_api.body import read_model
from adaplex_server.http_api.context import context_of
from adaplex_server.http_api.operation import Operation
from adaplex_server.http_api.schemas.inventory import LoadLoraRequest, UnloadLoraRequest
from adaplex_server.http_api.settings import HttpSettings
from adaplex_server.service.service import Service


class LegacyLora:
    """Paths are resolved by the registry, which reads inside the configured adapter folder alone."""

    def __init__(self, service: Service, settings: HttpSettings) -> None:
        self._service = service
        self._settings = settings

    def operations(self) -> tuple[Operation, ...]:
        """What is served here."""
        return (
            Operation(
                method="POST",
                path="/v1/load_lora_adapter",
                handler=self.load,
                summary="Load an adapter from the server's adapter folder",
                body=LoadLoraRequest,
                answer="text/plain",
                errors=(400, 404, 409, 503, 507),
            ),
            Operation(
                method="POST",
                path="/v1/unload_lora_adapter",
                handler=self.unload,
                summary="Unload an adapter",
                body=UnloadLoraRequest,
                answer="text/plain",
                errors=(400, 404, 409),
            ),
        )

    async def load(self, request: Request) -> Response:
        """Answered after the adapter has been proved; the whole load goes on even if the client leaves."""
        limits = self._settings
        body = await read_model(request, LoadLoraRequest, limits.max_body_bytes, limits.body_idle)
        name, registry, info = body.lora_name, self._service.registry, self._service.info()
        self._service.gate.check_name(context_of(request.scope).caller, name)
        if body.base_model_name not in (None, info.base, *info.aliases):
            raise InvalidRequest(
                f"base_model_name is '{body.base_model_name[:100]}', but this server's base is '{info.base}'.",  # type: ignore[index]
                param="base_model_name",
            )
        if not body.load_inplace and any(one.name == name for one in registry.list()):
            raise InvalidRequest(
                f"The LoRA adapter '{name[:100]}' has already been loaded; send load_inplace: true to replace it.",
                param="lora_name",
            )
        await registry.load_path(name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """Answered once no later request can reach it."""
        limits = self._settings
        body = await read_model(request, UnloadLoraRequest, limits.max_body_bytes, limits.body_idle)
        self._service.gate.check_name(context_of(request.scope).caller, body.lora_name)
        await self._service.registry.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
