"""`adaplex.v1.Adapters`: list, describe, load, compose and unload adapters by name."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import closing

import grpc

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.names import check_name
from adaplex_proto.v1 import adaplex_pb2 as pb
from adaplex_proto.v1 import adaplex_pb2_grpc as pb_grpc
from adaplex_server.grpc_api.access import caller_of
from adaplex_server.grpc_api.errors import unary
from adaplex_server.grpc_api.translate import adapter_message
from adaplex_server.service.composed_name import NamedPart
from adaplex_server.service.service import Service
from adaplex_server.service.staged_files import StagedFiles


class AdaptersServicer(pb_grpc.AdaptersServicer):
    """Owns nothing; every rule is the registry's. max_upload: bytes of one adapter at most."""

    def __init__(self, service: Service, max_upload: int) -> None:
        self._gate = service.gate
        self._registry = service.registry
        self._max_upload = max_upload

    @unary
    async def List(self, request: pb.ListAdaptersRequest, context: grpc.aio.ServicerContext) -> pb.ListAdaptersResponse:
        caller = caller_of(context, self._gate)
        return pb.ListAdaptersResponse(
            adapters=[adapter_message(info) for info in self._registry.list() if caller.may_name(info.name)]
        )

    @unary
    async def Describe(self, request: pb.DescribeAdapterRequest, context: grpc.aio.ServicerContext) -> pb.Adapter:
        self._gate.check_name(caller_of(context, self._gate), request.name)
        return adapter_message(self._registry.describe(request.name))

    @unary
    async def Load(
        self, requests: AsyncIterator[pb.LoadAdapterRequest], context: grpc.aio.ServicerContext
    ) -> pb.Adapter:
        """Answered when the adapter is durable and proved."""
        with self._registry.staging() as staging, closing(StagedFiles(staging, self._max_upload)) as files:
            name = await _receive(requests, files)
            self._gate.check_name(caller_of(context, self._gate), name)
            return adapter_message(await self._registry.upload(name, await files.complete()))

    @unary
    async def Compose(self, request: pb.ComposeAdapterRequest, context: grpc.aio.ServicerContext) -> pb.Adapter:
        """As durable as an upload when it is answered."""
        check_name(request.name)
        caller = caller_of(context, self._gate)
        for name in (request.name, *(part.adapter for part in request.parts)):
            self._gate.check_name(caller, name)
        parts = [NamedPart(part.adapter, part.weight if part.HasField("weight") else 1.0) for part in request.parts]
        return adapter_message(await self._registry.compose(request.name, parts))

    @unary
    async def Unload(
        self, request: pb.UnloadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.UnloadAdapterResponse:
        self._gate.check_name(caller_of(context, self._gate), request.name)
        await self._registry.unload(request.name)
        return pb.UnloadAdapterResponse()


async def _receive(requests: AsyncIterator[pb.LoadAdapterRequest], files: StagedFiles) -> str:
    """The files into their folder; the name that the first message gave, checked before any byte is taken."""
    name: str | None = None
    present: str | None = None
    async for request in requests:
        part = request.WhichOneof("part")
        if name is None:
            if part != "name":
                raise InvalidRequest("the first message must hold the adapter's name", param="name")
            name = check_name(request.name)
        elif part != "chunk":
            raise InvalidRequest("every message after the first must hold a chunk of a file", param="chunk")
        else:
            if request.chunk.file_name != present:
                await files.end()
                present = request.chunk.file_name
                files.begin(present)
            await files.write(request.chunk.data)
    if name is None:
        raise InvalidRequest("no message came; the first must hold the adapter's name", param="name")
    return name
