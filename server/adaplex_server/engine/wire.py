"""Frames over a socket: 4 bytes of length (little-endian), then a msgpack body of one tagged message."""

from __future__ import annotations

import socket
import struct
from typing import Any

import msgspec

_LENGTH = struct.Struct("<I")
MAX_FRAME = 256 << 20
"""Longer frames are a sign of a broken peer, not of a large message."""

_encoder = msgspec.msgpack.Encoder()


def pack(message: msgspec.Struct) -> bytes:
    """The bytes of one frame."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def send(sock: socket.socket, message: msgspec.Struct) -> None:
    """Write one frame; raises OSError when the peer is gone."""
    sock.sendall(pack(message))


class FrameReader:
    """Reads the frames of a blocking socket. It reads ahead, so a socket has one reader."""

    def __init__(self, sock: socket.socket) -> None:
        self._file = sock.makefile("rb")

    def read(self, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
        """The next message, or None at the end of the file. A frame cut short also counts as the end."""
        head = self._file.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack(head)
        if length > MAX_FRAME:
            raise ValueError(f"a frame of {length} bytes is over the limit of {MAX_FRAME}")
        body = self._file.read(length)
        return decoder.decode(body) if len(body) == length else None
