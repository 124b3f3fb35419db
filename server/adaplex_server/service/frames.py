"""The asyncio side of the frames between the two processes (the blocking side and the format: `engine.wire`)."""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Callable
from typing import cast

import msgspec

from adaplex_server.engine.messages import FromEngine, ToEngine
from adaplex_server.engine.wire import MAX_FRAME, pack

log = logging.getLogger(__name__)
_LENGTH = struct.Struct("<I")


class FrameProtocol(asyncio.Protocol):
    """Cuts the engine's bytes into messages and writes ours.

    on_message is called in order of arrival, on_lost once, after the last message, with why (a broken frame or a
    socket error) or None at the end of the file.
    """

    def __init__(self, on_message: Callable[[FromEngine], None], on_lost: Callable[[str | None], None]) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._decode = msgspec.msgpack.Decoder(FromEngine).decode
        self._buffer = bytearray()
        self._broken: str | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        start, end = 0, len(buffer)
        while end - start >= 4:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > MAX_FRAME:
                return self._give_up(f"a frame of {length} bytes")
            if end - start < 4 + length:
                break
            try:
                message = self._decode(bytes(buffer[start + 4 : start + 4 + length]))
            except msgspec.DecodeError as error:
                return self._give_up(f"a frame that is no message: {error}")
            start += 4 + length
            self._on_message(message)
        del buffer[:start]
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost(self._broken or (f"{type(exc).__name__}: {exc}" if exc else None))

    def send(self, message: ToEngine | msgspec.Struct) -> None:
        """Queue one frame. Without effect once the connection is lost: `on_lost` tells."""
        if self._transport and not self._transport.is_closing():
            self._transport.write(pack(message))

    def close(self) -> None:
        """End of file for the engine, after what is queued."""
        if self._transport:
            self._transport.close()

    def _give_up(self, why: str) -> None:
        log.error("the engine sent %s; its process is given up", why)
        self._broken = f"it sent {why}"
        self._buffer.clear()
        if self._transport:
            self._transport.abort()
