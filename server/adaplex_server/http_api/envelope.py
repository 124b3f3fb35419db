"""The outermost layer: gives each request its id, answers what nobody caught, writes one access line."""

from __future__ import annotations

import logging
import time

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adaplex_adapters.errors import InternalError
from adaplex_server.http_api.context import RequestContext, open_context
from adaplex_server.http_api.errors import error_response
from adaplex_server.request_scope import current_scope
from adaplex_server.service.access.gate import Gate

_ACCESS = logging.getLogger("adaplex.access")
_LOG = logging.getLogger(__name__)


class Envelope:
    """Pure ASGI: nothing is buffered, so that a stream passes through untouched."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; errors never pass this point."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = open_context(scope)
        status = 0

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                left = self._gate.headers(context.caller)
                stamps = ((b"x-request-id", context.request_id), *((k.encode(), v) for k, v in left.items()))
                message["headers"] = [*message["headers"], *((name, value.encode()) for name, value in stamps)]
            await send(message)

        try:
            await self._app(scope, receive, stamped)
        except Exception:
            context.outcome = "internal_error"
            _LOG.exception("a bug: %s %r failed (request %s)", scope["method"], scope["path"], context.request_id)
            if status:  # the first byte has gone: breaking the connection is the only honest end
                raise
            bug = InternalError(f"The server has a bug; its log has the trace under request {context.request_id}.")
            await error_response(bug)(scope, receive, stamped)
        finally:
            _write_access_line(scope, context, status)


def _write_access_line(scope: Scope, context: RequestContext, status: int) -> None:
    """One JSON line: control characters are escaped by the encoder; query, headers and bodies are left out."""
    if not _ACCESS.isEnabledFor(logging.INFO):
        return
    client, named = scope.get("client"), current_scope()
    line = {
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status,
        "ms": round((time.monotonic() - context.started) * 1000, 1),
        "request_id": context.request_id,
        "client": client[0] if client else None,
        "key": context.caller.key,
        "model": context.model[:100] if context.model else None,
        "outcome": context.outcome,
        **({"trace_id": named.trace_id} if named is not None and named.trace_id else {}),
    }
    _ACCESS.info("%s", msgspec.json.encode(line).decode(), extra={"fields": line})
