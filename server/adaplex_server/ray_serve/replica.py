"""`Replica`: a whole Adaplex server inside a Ray Serve replica, without sockets of its own."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve
from starlette.types import Message

from adaplex_adapters.errors import ModelNotFound
from adaplex_server.cli.parts import key_file, service_settings
from adaplex_server.http_api.app import create_app
from adaplex_server.ray_serve.adapter_folder import AdapterFolder
from adaplex_server.ray_serve.forwarded import Forwarded, answer
from adaplex_server.service.access.key_store import KeyStore
from adaplex_server.service.service import Service
from adaplex_server.service.settings import ServiceSettings
from adaplex_server.settings import ServerSettings

log = logging.getLogger(__name__)


class Replica:
    """Owns a `Service` and its scratch folder: adapters come from the shared folder, so nothing here must outlive it.

    Ray calls the methods; all of them run on one event loop.
    """

    async def __init__(self, settings: ServerSettings) -> None:  # type: ignore[misc]  # Ray awaits it
        """Load the base and the adapters; Ray sends requests when this is over. Raises StartupError."""
        self._scratch = tempfile.TemporaryDirectory(prefix="adaplex-replica-")
        built = _settings(settings, Path(self._scratch.name))
        self._service = Service(built)
        self._app = create_app(self._service)
        self._folder = AdapterFolder(settings.adapters, self._service.registry)
        self._id = serve.get_replica_context().replica_id.unique_id.encode()
        await self._service.start()

    def base_names(self) -> tuple[str, ...]:
        """The names of the base, which every replica serves alike."""
        info = self._service.info()
        return (info.base, *info.aliases)

    async def answer(self, request: Forwarded, adapter: str | None) -> AsyncGenerator[tuple[Message, ...], None]:
        """The answer's ASGI messages. adapter: whom the request names, None for the base."""
        if adapter is not None:
            await self._prepare(adapter)
        async with aclosing(answer(self._app, request)) as messages:
            async for batch in messages:
                yield tuple(self._signed(one) for one in batch)

    def _signed(self, message: Message) -> Message:
        """The head of the answer with this replica's id: for those who ask where a request went."""
        if message["type"] != "http.response.start":
            return message
        return {**message, "headers": [*message["headers"], (b"x-adaplex-replica", self._id)]}

    async def _prepare(self, adapter: str) -> None:
        """Take up what is new in the folder, and let Ray know that this replica now holds the adapter.

        What is wrong with the name is told by the answer itself, after the caller's key was checked.
        """
        if not self._service.info().ready:
            return
        await self._folder.refresh(adapter)
        try:
            self._service.registry.resolve(adapter)
        except ModelNotFound:
            return
        await self.hold(adapter)

    async def hold(self, adapter: str) -> str:
        """Replaced by `make_replica`, which knows how many names Ray should remember."""
        raise NotImplementedError

    async def check_health(self) -> None:
        """Ray asks every few seconds and starts another replica when this raises."""
        info = self._service.info()
        if info.state == "failed":
            raise RuntimeError(f"the engine fails again and again: {info.detail}")

    async def __del__(self) -> None:
        """Ray awaits it when the replica is to end: what runs is finished first."""
        await self._service.drain()
        await self._service.close()
        self._scratch.cleanup()


def make_replica(slots: int) -> type[Any]:
    """The class to deploy. Ray is told of the `slots` adapters used last, which are those on the device."""

    class Multiplexed(Replica):
        @serve.multiplexed(max_num_models_per_replica=slots)
        async def hold(self, adapter: str) -> str:
            """What Ray keeps for a name: nothing but the name, as slots are the engine's own business."""
            return adapter

    return Multiplexed


def _settings(settings: ServerSettings, scratch: Path) -> ServiceSettings:
    """As `adaplex serve` would build it, with the data in `scratch` but the keys where `adaplex keys` keeps them."""

    def progress(text: str, fraction: float) -> None:
        log.info("%s (%d %%)", text, round(100 * fraction))

    built = service_settings(settings.model_copy(update={"data_dir": scratch}), progress)
    return replace(built, keys=KeyStore(key_file(settings.data_dir)))
