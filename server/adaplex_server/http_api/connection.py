"""One HTTP connection: uvicorn's httptools protocol with the bounds that it lacks.

A connection is ended if no complete request head comes in time, if a head or an unwanted body after the answer is too
large, or if its reader stays behind: its rows must not be held by a full socket. Parse errors are told as JSON.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from adaplex_adapters.errors import InvalidRequest
from adaplex_server.http_api.errors import error_bytes
from adaplex_server.http_api.settings import HttpSettings

_DISCARD_BYTES = 256 << 20  # of a refused body: clients read the answer only after they have sent everything


def bounded_protocol(settings: HttpSettings) -> type[asyncio.Protocol]:
    """The protocol class with these settings, as uvicorn takes it."""

    class BoundedProtocol(HttpToolsProtocol):
        _head_bytes = 0
        _discarded = 0
        _head_timer: asyncio.TimerHandle | None = None
        _stall_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_arrived()
            self._caught_up()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._head_timer is None or self.transport.is_closing():
                return
            self._head_bytes += len(data)  # the parser keeps an incomplete head, without a bound of its own
            if self._head_bytes > settings.max_header_bytes:
                self.send_400_response(f"The request's head is larger than {settings.max_header_bytes} bytes.")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._head_bytes = self._discarded = 0
            if self._head_timer is None:
                self._expect_head()

        def on_headers_complete(self) -> None:
            self._head_arrived()
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            if self.cycle.response_complete:
                self._discarded += len(body)
                if self._discarded > _DISCARD_BYTES:
                    self.transport.close()
            super().on_body(body)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stall_timer = self.loop.call_later(settings.stall, self.transport.abort)

        def resume_writing(self) -> None:
            self._caught_up()
            super().resume_writing()

        def send_400_response(self, msg: str) -> None:
            body = error_bytes(InvalidRequest(msg if msg.endswith(".") else f"{msg}."))
            head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
            self.transport.close()

        def _expect_head(self) -> None:
            self._head_timer = self.loop.call_later(settings.header, self._close)

        def _head_arrived(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _caught_up(self) -> None:
            if self._stall_timer is not None:
                self._stall_timer.cancel()
                self._stall_timer = None

        def _close(self) -> None:
            if not self.transport.is_closing():
                self.transport.close()

    return BoundedProtocol


def uvicorn_options(settings: HttpSettings) -> dict[str, Any]:
    """How uvicorn is to run: fast parser and loop, our connections, nothing that logs or guesses by itself."""
    return {
        "http": bounded_protocol(settings),
        "ws": "none",
        "lifespan": "off",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "timeout_keep_alive": settings.keep_alive,
        "ssl_certfile": settings.tls and settings.tls.chain,
        "ssl_keyfile": settings.tls and settings.tls.key,
    }
