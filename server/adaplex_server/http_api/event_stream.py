"""A stream of server-sent events, and the one place that knows whether the first byte has gone.

Until then an error becomes an HTTP status; afterwards it becomes an event with an error object, and the stream ends
without [DONE]. A client that leaves ends the events' iterator.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from adaplex_adapters.errors import AdaplexError, Cancelled, InternalError
from adaplex_server.http_api.context import RequestContext, context_of
from adaplex_server.http_api.disconnect import stop, until_gone
from adaplex_server.http_api.errors import error_bytes
from adaplex_server.http_api.settings import HttpSettings

_LOG = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"

# The library would cut every stream at the first SIGTERM; draining is the service's decision.
AppStatus.disable_automatic_graceful_drain()


def event(body: bytes) -> bytes:
    """One event with a JSON body, which never holds a line break."""
    return b"data: " + body + b"\n\n"


async def open_stream(request: Request, events: AsyncGenerator[bytes, None], settings: HttpSettings) -> Response:
    """Wait for the first event, so that errors before it are told by status, then answer with the whole stream.

    After `first_byte_patience` the stream is opened anyway, so that a client in a long queue sees a sign of life.
    """
    first = asyncio.ensure_future(anext(events))
    gone = asyncio.ensure_future(until_gone(request.receive))
    try:
        await asyncio.wait({first, gone}, timeout=settings.first_byte_patience, return_when=asyncio.FIRST_COMPLETED)
        if first.done():
            first.result()  # raises what went wrong
        elif gone.done():
            raise Cancelled("The client went away before the answer began.")
    except BaseException:
        await stop(first)
        await events.aclose()
        raise
    finally:
        await stop(gone)
    return _EventStream(first, events, context_of(request.scope), settings)


async def _told(
    first: asyncio.Future[bytes], events: AsyncGenerator[bytes, None], context: RequestContext
) -> AsyncGenerator[bytes, None]:
    """The events, with an error told as the last of them."""
    try:
        yield await first
        async for one in events:
            yield one
    except AdaplexError as error:
        context.outcome = error.code
        yield event(error_bytes(error))
    except Exception:
        context.outcome = "internal_error"
        _LOG.exception("a bug: a stream broke (request %s)", context.request_id)
        bug = InternalError(f"The server has a bug; its log has the trace under request {context.request_id}.")
        yield event(error_bytes(bug))
    except BaseException:  # the client left or the server stops; there is nobody to tell
        context.outcome = "cancelled"
        raise


class _EventStream(EventSourceResponse):
    """sse-starlette's response: headers, pings, and the end when the client leaves.

    Only the loop over the events is our own: they are ready-made bytes, and the library's conversion, logging and
    timeout around each of them cost as much again as the write itself.
    """

    def __init__(
        self,
        first: asyncio.Future[bytes],
        events: AsyncGenerator[bytes, None],
        context: RequestContext,
        settings: HttpSettings,
    ) -> None:
        self._first = first
        self._events = events
        self._told = _told(first, events, context)
        super().__init__(
            self._told,
            ping=settings.ping,
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
            sep="\n",
        )

    async def _stream_response(self, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for one in self._told:
                await send({"type": "http.response.body", "body": one, "more_body": True})
        finally:
            with anyio.CancelScope(shield=True):  # cancelled between two events: nothing else would close them
                await self._told.aclose()
                await stop(self._first)
                await self._events.aclose()
        async with self._send_lock:
            self.active = False
            await send({"type": "http.response.body", "body": b"", "more_body": False})
