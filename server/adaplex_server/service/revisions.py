"""How a revision comes and goes: stored, proved by the engine, used by rows, dropped when nobody wants it any more.

Everything that makes or drops a revision happens under that revision's lock. Who keeps one without using it (a name
that points at it, a composition that may be asked for again) says so through `keep`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.errors import NotFound, StorageFailed, Unavailable
from adaplex_adapters.spec import Adapter
from adaplex_adapters.store import AdapterStore
from adaplex_server.engine.messages import AdapterLoaded
from adaplex_server.service.engine_client import EngineClient
from adaplex_server.service.keyed_locks import KeyedLocks
from adaplex_server.service.tasks import Tasks
from adaplex_server.service.uses import Uses

log = logging.getLogger(__name__)


class Revisions:
    """Owns the store and who uses what is in it. `open` before use; until then everything raises Unavailable."""

    def __init__(self, engine: EngineClient, tasks: Tasks) -> None:
        self._engine = engine
        self._tasks = tasks
        self._uses = Uses(self._on_idle)
        self._locks = KeyedLocks()
        # Revision -> which engine (counted by restarts) has used it.
        self._resident: dict[str, int] = {}
        self._keepers: list[Callable[[str], bool]] = []
        self._opened: tuple[AdapterStore, BaseShape] | None = None

    def open(self, store: AdapterStore, shape: BaseShape) -> None:
        """From now on there are adapters."""
        self._opened = store, shape

    @property
    def opened(self) -> tuple[AdapterStore, BaseShape]:
        """The store and the base that its adapters are for."""
        if self._opened is None:
            raise Unavailable("the server is starting; try again in a moment", retry_after=5.0)
        return self._opened

    def keep(self, keeper: Callable[[str], bool]) -> None:
        """A revision of which `keeper` says True stays, used or not."""
        self._keepers.append(keeper)

    # ---- uses --------------------------------------------------------------------------------------------------------

    def begin_use(self, name: str, revision: str) -> None:
        """A row of this name is submitted: the revision stays until `end_use`."""
        self._uses.begin(name, revision)
        self._resident[revision] = self._engine.state.restarts

    def end_use(self, name: str, revision: str) -> None:
        """The row has ended; once for each `begin_use`."""
        self._uses.end(name, revision)

    @contextmanager
    def holding(self, *revisions: str) -> Iterator[None]:
        """They stay for the time of the `with`."""
        for revision in revisions:
            self._uses.begin(None, revision)
        try:
            yield
        finally:
            for revision in revisions:
                self._uses.end(None, revision)

    def rows(self, name: str) -> int:
        """Rows of this name under way, of whatever revision."""
        return self._uses.rows(name)

    def busy(self, revision: str) -> bool:
        """Whether a row or an installation uses it."""
        return self._uses.busy(revision)

    def resident(self, revision: str) -> bool:
        """Whether the present engine has used it."""
        return self._resident.get(revision) == self._engine.state.restarts

    # ---- coming and going --------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def placed(self, adapter: Adapter) -> AsyncIterator[AdapterLoaded]:
        """Store and prove it. It stays for the time of the `with`, in which somebody begins to keep it or lets it go.

        Raises InvalidAdapter and its kinds, StorageFailed, Unavailable.
        """
        store, _ = self.opened
        revision = adapter.spec.revision
        with self.holding(revision):
            async with self._locks.hold(revision):
                await asyncio.to_thread(store.commit, adapter)
                yield await self._engine.link().load(revision)
        self._resident[revision] = self._engine.state.restarts

    async def retire(self, revision: str) -> None:
        """Drop the revision from engine and store, if nobody wants it.

        What cannot be deleted is pruned at the next start.
        """
        async with self._locks.hold(revision):
            store, _ = self.opened
            if self._wanted(revision) or not await asyncio.to_thread(store.contains, revision):
                return
            try:
                dropped = await self._engine.link().drop(revision)
                log.info("revision %s is dropped: %d bytes of the device are free", revision[:12], dropped.freed_bytes)
            except Unavailable:
                log.info("revision %s went with the engine", revision[:12])
            self._resident.pop(revision, None)
            try:
                await asyncio.to_thread(store.delete, revision)
            except (StorageFailed, NotFound) as error:
                log.error("revision %s could not be deleted: %s", revision[:12], error.message)

    def _on_idle(self, revision: str) -> None:
        if not self._wanted(revision):
            self._tasks.spawn(self.retire(revision))

    def _wanted(self, revision: str) -> bool:
        return self._uses.busy(revision) or any(keeper(revision) for keeper in self._keepers)
