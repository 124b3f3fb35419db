"""Runs the HTTP skin in this process: takes the port at once, listens, and ends without cutting streams."""

from __future__ import annotations

import contextlib
import errno
import math
import socket
from collections.abc import Iterator

import uvicorn

from adaplex_adapters.errors import StartupError
from adaplex_server.http_api.app import create_app
from adaplex_server.http_api.connection import uvicorn_options
from adaplex_server.http_api.settings import HttpSettings
from adaplex_server.service.service import Service


def bind(host: str, port: int, backlog: int = 2048) -> socket.socket:
    """A listening socket. Called before anything heavy, so that a port in use is told at once. Raises StartupError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise StartupError(
            f"'{host}' is not an address of this machine ({error}); choose another with --http."
        ) from error
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(backlog)
    except OSError as error:
        listening.close()
        raise StartupError(_why_not(error, host, port)) from error
    listening.setblocking(False)
    return listening


def _why_not(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} on {host} is in use by another program; stop it or choose another port with --http."
    if error.errno == errno.EACCES:
        return f"Port {port} on {host} is not allowed for this user; choose one above 1023 with --http."
    return f"Cannot listen on {host}:{port}: {error.strerror}; choose another address with --http."


class HttpServer:
    """Answers on an already listening socket until `stop()`; signals are the composition root's business."""

    def __init__(self, service: Service, listening: socket.socket, settings: HttpSettings | None = None) -> None:
        settings = settings or HttpSettings()
        self._socket = listening
        config = uvicorn.Config(
            create_app(service, settings),
            timeout_graceful_shutdown=math.ceil(settings.drain),
            **uvicorn_options(settings),
        )
        self._server = _Server(config)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._socket.getsockname()[1])

    async def run(self) -> None:
        """Serve until `stop()`; then no new connections, and running answers get `drain` seconds to finish."""
        await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        """Begin the end; `run` returns when it is over."""
        self._server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: HTTP and gRPC share one process, which has one owner of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
