"""/health, /ready, /metrics and /version: for those who watch the server."""

from __future__ import annotations

import asyncio
import gzip
from importlib.metadata import version

from starlette.requests import Request
from starlette.responses import Response

from adaplex_server.http_api.operation import Operation, json_response
from adaplex_server.http_api.schemas.inventory import Health, Version
from adaplex_server.service.service import Service


class Status:
    """Nothing here waits for the engine."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def operations(self) -> tuple[Operation, ...]:
        """What is served here."""
        text = "text/plain"
        get = "GET"
        return (
            Operation(
                method=get,
                path="/health",
                handler=self.health,
                summary="Whether the process is alive; 503 only if its engine fails again and again",
                answer=Health,
                errors=(503,),
            ),
            Operation(
                method=get,
                path="/ready",
                handler=self.ready,
                summary="Whether new requests are taken",
                answer=Health,
                errors=(503,),
            ),
            Operation(method=get, path="/metrics", handler=self.metrics, summary="Prometheus metrics", answer=text),
            Operation(
                method=get, path="/version", handler=self.version, summary="The server's version", answer=Version
            ),
        )

    async def health(self, request: Request) -> Response:
        """Liveness."""
        return self._report(well=self._service.info().state != "failed")

    async def ready(self, request: Request) -> Response:
        """Readiness."""
        return self._report(well=self._service.info().ready)

    def _report(self, *, well: bool) -> Response:
        info = self._service.info()
        answer = Health("ok" if well else "unavailable", info.state, info.detail, round(info.progress, 3))
        response = json_response(answer, 200 if well else 503)
        if not well:
            response.headers["Retry-After"] = "1"
        return response

    async def metrics(self, request: Request) -> Response:
        """The exposition, as the service's registry makes it."""
        body, media_type = await self._service.scrape()
        headers = {"content-type": media_type, "vary": "accept-encoding"}
        if "gzip" in request.headers.get("accept-encoding", ""):
            body = await asyncio.to_thread(gzip.compress, body, 1)
            headers["content-encoding"] = "gzip"
        return Response(body, headers=headers)

    async def version(self, request: Request) -> Response:
        """The version of the installed distribution."""
        return json_response(Version(version("adaplex")))
