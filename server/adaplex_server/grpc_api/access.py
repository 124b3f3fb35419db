"""The gate in front of every gRPC call: the same policy, keys and words as over HTTP."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from adaplex_adapters.errors import AdaplexError
from adaplex_server.caller import Caller
from adaplex_server.grpc_api.errors import abort
from adaplex_server.service.access.gate import Gate

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]]


class GateInterceptor(grpc.aio.ServerInterceptor):
    """Lets a call through to its handler if the gate allows its method."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler:
        """The method's own handler, or one of the same kind that ends the call with the gate's error."""
        handler = await continuation(handler_call_details)
        if handler is None:  # an unknown method: answered as such
            return handler
        try:
            self._gate.allow(handler_call_details.method, _authorization(handler_call_details.invocation_metadata))
        except AdaplexError as error:
            return _refusing(handler, error)
        return handler


def caller_of(context: grpc.aio.ServicerContext, gate: Gate) -> Caller:
    """Who makes this call, which the interceptor has let through."""
    return gate.caller(_authorization(context.invocation_metadata()))


def _authorization(metadata: Any) -> str | None:
    for name, value in metadata or ():
        if name.lower() == "authorization":
            return value if isinstance(value, str) else None
    return None


def _refusing(handler: grpc.RpcMethodHandler, error: AdaplexError) -> grpc.RpcMethodHandler:
    async def unary(request: Any, context: grpc.aio.ServicerContext) -> None:
        await abort(context, error)

    async def stream(request: Any, context: grpc.aio.ServicerContext) -> Any:
        await abort(context, error)
        yield

    made: Any
    if handler.response_streaming:
        kind = "stream_stream" if handler.request_streaming else "unary_stream"
        made = getattr(grpc, f"{kind}_rpc_method_handler")(stream)
    else:
        kind = "stream_unary" if handler.request_streaming else "unary_unary"
        made = getattr(grpc, f"{kind}_rpc_method_handler")(unary)
    return made
