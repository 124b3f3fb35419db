"""`adaplex serve`: builds the parts from the settings and runs them until a signal: the server's composition root."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaplex_server.cli.descriptors import raise_limit
from adaplex_server.cli.logs import set_up_logs
from adaplex_server.cli.options import with_settings
from adaplex_server.cli.progress import StartupProgress
from adaplex_server.settings import ServerSettings, host_and_port, load_settings

if TYPE_CHECKING:
    from adaplex_server.grpc_api.server import GrpcServer
    from adaplex_server.http_api.server import HttpServer
    from adaplex_server.service.service import Service

READY_POLL_SECONDS = 0.5
log = logging.getLogger("adaplex")


def _serve(config: Path | None, flags: dict[str, Any]) -> None:
    """Serve a base model and its adapters over HTTP (OpenAI's API) and gRPC.

    Without options it serves the embedded SmolLM2-135M-Instruct, quantized to NF4 once into the cache folder, with
    five demo adapters, on 127.0.0.1:8000 (HTTP) and 127.0.0.1:50051 (gRPC).

    Every option is also a key of the TOML file and an environment variable; the command line wins over the environment,
    and the environment over the file.

    Examples:

      adaplex serve --base ./Llama-3.1-8B --adapters ./adapters --kv-memory 20GiB

      adaplex serve --base ./Llama-2-7b-Chat-GPTQ --http 0.0.0.0:8000

      ADAPLEX_MAX_ROWS=128 adaplex serve --config adaplex.toml
    """
    settings = load_settings(config, os.environ, flags)
    set_up_logs(settings.log_level, settings.log_format)
    raise_limit()
    with asyncio.Runner(loop_factory=_event_loop()) as runner:
        runner.run(run_server(settings))


serve = with_settings(_serve)


def _event_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it exists (not on Windows): it halves the cost of writing a token's event."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def run_server(settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Raises StartupError before anything is answered.

    Both ports are bound first, so that a port in use is told at once and not after the base was loaded.
    """
    from adaplex_server.cli.parts import service_settings
    from adaplex_server.grpc_api.server import GrpcServer
    from adaplex_server.http_api.server import HttpServer, bind
    from adaplex_server.http_api.settings import HttpSettings
    from adaplex_server.service.service import Service
    from adaplex_server.tls import read_certificate

    tls = read_certificate(settings.tls_cert, settings.tls_key)
    http_socket = bind(*host_and_port(settings.http, "http"))
    say = log.info if settings.log_format == "json" else None
    with StartupProgress(say) as progress, contextlib.closing(http_socket):
        built = service_settings(settings, progress.report)
        service = Service(built, progress.report)
        grpc_server = None
        if settings.grpc != "off":
            grpc_server = GrpcServer(service, *host_and_port(settings.grpc, "grpc"), settings.max_upload, tls)
        http_settings = HttpSettings(max_upload_bytes=settings.max_upload, drain=settings.drain_seconds, tls=tls)
        http_server = HttpServer(service, http_socket, http_settings)
        async with _stop_signal() as stopped:
            serving = asyncio.create_task(http_server.run())
            if grpc_server:
                await grpc_server.start()
            starting = asyncio.create_task(service.start())
            try:
                await asyncio.wait({starting, stopped, serving}, return_when=asyncio.FIRST_COMPLETED)
                if starting.done():
                    starting.result()
                    progress.finish(_welcome(settings, service))
                    await _run_until_stopped(service, grpc_server, stopped, serving)
            finally:
                starting.cancel()
                await _shut_down(service, http_server, grpc_server, serving, settings.drain_seconds)


async def _run_until_stopped(
    service: Service, grpc_server: GrpcServer | None, stopped: asyncio.Future, serving: asyncio.Task
) -> None:
    """Wait for a signal or the end of the HTTP server, keeping gRPC's health in step with the service's readiness."""
    shown = None
    while not (stopped.done() or serving.done()):
        ready = service.info().ready
        if grpc_server and ready != shown:
            await grpc_server.set_ready(ready)
            shown = ready
        await asyncio.wait({stopped, serving}, timeout=READY_POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)


async def _shut_down(
    service: Service, http_server: HttpServer, grpc_server: GrpcServer | None, serving: asyncio.Task, grace: float
) -> None:
    """Drain: refuse new work with a retry hint, finish what runs, then close both listeners and the engine."""
    if grpc_server:
        await grpc_server.set_ready(False)
    await service.drain(grace)
    http_server.stop()
    if grpc_server:
        await grpc_server.stop(1.0)
    await asyncio.wait({serving})
    await service.close()
    # An HTTP server that broke down is told only now, when everything else has ended in order.
    serving.result()


@contextlib.asynccontextmanager
async def _stop_signal() -> AsyncIterator[asyncio.Future]:
    """A future that SIGTERM or SIGINT completes; a second signal ends the process at once, as people expect."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[None] = loop.create_future()

    def on_signal() -> None:
        if stopped.done():
            os._exit(130)
        stopped.set_result(None)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        yield stopped
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _welcome(settings: ServerSettings, service: Service) -> str:
    names = ", ".join(a.name for a in service.registry.list()) or "none yet"
    scheme = "http" if settings.tls_cert is None else "https"
    grpc_line = "" if settings.grpc == "off" else f"\n  gRPC      {settings.grpc}"
    return f"Serving {service.info().base}\n  adapters  {names}\n  HTTP      {scheme}://{settings.http}/v1{grpc_line}"
