"""Tells an error of the tree to a gRPC client: `google.rpc.Status` with ErrorInfo, BadRequest and RetryInfo details.

The code comes from the error's class alone. What is not in the tree is a bug of ours: it is logged with its trace and
told as INTERNAL without its text, which might reveal paths or prompts.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import wraps
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from adaplex_adapters.errors import AdaplexError, InternalError

log = logging.getLogger(__name__)
DOMAIN = "adaplex"


def status_of(error: AdaplexError) -> status_pb2.Status:
    """The wire form of an error."""
    details: list[Any] = [
        error_details_pb2.ErrorInfo(
            reason=(error.code or error.type).upper(),
            domain=DOMAIN,
            metadata={"param": error.param} if error.param else {},
        )
    ]
    if error.param and error.grpc_code == "INVALID_ARGUMENT":
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.param, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        wrapped = any_pb2.Any()
        wrapped.Pack(detail)
        packed.append(wrapped)
    return status_pb2.Status(code=code_pb2.Code.Value(error.grpc_code), message=error.message, details=packed)


async def abort(context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
    """End the call with this error."""
    if not isinstance(error, AdaplexError):
        log.error("unexpected error in a gRPC call", exc_info=error)
        error = InternalError("an unexpected error happened in the server; its log has the trace")
    status = rpc_status.to_status(status_of(error))
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort() returns by raising")


def unary(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """A handler with one answer, whose errors are told by `abort`."""

    @wraps(method)
    async def wrapped(self: Any, request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await method(self, request, context)
        except (grpc.aio.AbortError, grpc.aio.BaseError):
            raise
        except Exception as error:
            await abort(context, error)

    return wrapped


def streaming(method: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    """A handler with a stream of answers, whose errors are told by `abort`."""

    @wraps(method)
    async def wrapped(self: Any, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            async for answer in method(self, request, context):
                yield answer
        except (grpc.aio.AbortError, grpc.aio.BaseError):
            raise
        except Exception as error:
            await abort(context, error)

    return wrapped
