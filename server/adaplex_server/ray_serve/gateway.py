"""`Gateway`: reads a request far enough to know its model, and lets Ray choose a replica that holds that adapter."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from adaplex_adapters.errors import AdaplexError, InvalidRequest, NotFound, Unavailable
from adaplex_server.http_api.body import limited_body
from adaplex_server.http_api.errors import error_response
from adaplex_server.http_api.settings import HttpSettings
from adaplex_server.ray_serve.forwarded import Forwarded

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_LOG = logging.getLogger(__name__)

GENERATING = ("/v1/chat/completions", "/v1/completions")
READ = ("/v1/models", "/v1/adapters", "/health", "/ready", "/version", "/openapi.json")


class Gateway:
    """The deployment that takes HTTP requests. It holds no model; a request's whole cost here is one JSON parse."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas
        self._limits = HttpSettings()
        # Every replica has the base, so requests for it go wherever there is room.
        self._base_names: frozenset[str] | None = None

    async def __call__(self, request: Request) -> Response:
        """Answer one request, by a replica unless it is refused here."""
        try:
            path = request.url.path.removeprefix(request.scope.get("root_path", "")) or "/"
            _check(request.method, path)
            limits = self._limits
            body = b"".join([part async for part in limited_body(request, limits.max_body_bytes, limits.body_idle)])
            handle = self._replicas.options(method_name="answer", stream=True)
            adapter = await self._adapter(body) if path in GENERATING else None
            if adapter is not None:
                handle = handle.options(multiplexed_model_id=adapter)
            return _Relay(handle.remote(Forwarded.of(request, path, body), adapter))
        except AdaplexError as error:
            return error_response(error)

    async def _adapter(self, body: bytes) -> str | None:
        """The adapter that a request names; None for the base, and for what the replica will refuse."""
        if self._base_names is None:
            self._base_names = frozenset(await self._replicas.base_names.remote())
        try:
            parsed = orjson.loads(body)
        except orjson.JSONDecodeError:
            return None
        name = parsed.get("model") if isinstance(parsed, dict) else None
        return name if isinstance(name, str) and name not in self._base_names else None


def _check(method: str, path: str) -> None:
    """Refuse what would change one replica alone. Raises NotFound, InvalidRequest."""
    reads = method in ("GET", "HEAD") and any(path == one or path.startswith(f"{one}/") for one in READ)
    if reads or (method == "POST" and path in GENERATING):
        return
    if path.startswith("/v1/"):
        raise InvalidRequest(
            f"{method} {path[:100]} is not possible on several replicas at once: put the adapter's folder into the "
            "servers' adapter folder, from where every replica takes it"
        )
    raise NotFound(f"There is no {method} {path[:100]} here; GET /openapi.json lists what a replica has.")


class _Relay(Response):
    """A response whose messages come from a replica; a client that leaves ends the request there."""

    def __init__(self, messages: Any) -> None:
        super().__init__()
        self._messages = messages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from ray.exceptions import RayError  # here, so that the module can be had without Ray

        started = False
        try:
            async for message in _each(self._messages):
                started = True
                await send(message)
        except RayError as error:
            if started:  # the first byte has gone: breaking the connection is the only honest end
                raise
            _LOG.warning("a replica was lost before it answered: %r", error)
            lost = Unavailable("the server that was to answer is gone; try again", retry_after=1.0)
            await error_response(lost)(scope, receive, send)
        finally:
            self._messages.cancel()


async def _each(batches: AsyncIterator[tuple[Message, ...]]) -> AsyncIterator[Message]:
    async for batch in batches:
        for message in batch:
            yield message
