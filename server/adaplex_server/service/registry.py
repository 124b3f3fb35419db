"""Which name is served by which revision, and how a revision comes and goes.

The registry owns the names in memory (a copy of the catalogue) and decides when a revision is dropped: when no name
points at it, no row uses it and nobody is installing it. Everything that changes a name happens under that name's
lock; everything that makes or drops a revision under that revision's. A change that fails half-way leaves the names
as they were.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.catalogue import Catalogue, CatalogueEntry
from adaplex_adapters.errors import (
    AdaplexError,
    Conflict,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    StartupError,
    StorageFailed,
    Unavailable,
)
from adaplex_adapters.names import check_name
from adaplex_adapters.reader import ReadLimits, read_adapter
from adaplex_adapters.spec import Adapter
from adaplex_adapters.store import AdapterStore
from adaplex_server.engine.messages import AdapterLoaded
from adaplex_server.model.config import read_config
from adaplex_server.model.families import base_shape
from adaplex_server.service.engine_client import EngineClient
from adaplex_server.service.keyed_locks import KeyedLocks
from adaplex_server.service.settings import ServiceSettings
from adaplex_server.service.types import AdapterInfo, AdapterState
from adaplex_server.service.uses import Uses

log = logging.getLogger(__name__)
NAMES_TOLD = 30
INSTALLATIONS = 2
"""Installations at once: each holds an adapter in memory."""
T = TypeVar("T")


class Registry:
    """The adapters of a service. `open` before use; until then it is empty."""

    def __init__(self, settings: ServiceSettings, engine: EngineClient) -> None:
        self._settings = settings
        self._engine = engine
        self._base_names = (settings.engine.base_name, *settings.aliases)
        self._limits = ReadLimits(max_rank=settings.engine.max_rank, max_file_bytes=settings.max_adapter_bytes)
        self._entries: dict[str, CatalogueEntry] = {}
        self._failed: dict[str, str] = {}
        # Revision -> which engine (counted by restarts) has used it.
        self._resident: dict[str, int] = {}
        self._uses = Uses(self._on_idle)
        self._name_locks, self._revision_locks = KeyedLocks(), KeyedLocks()
        self._installing = asyncio.Semaphore(INSTALLATIONS)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._opened: tuple[AdapterStore, Catalogue, BaseShape] | None = None

    async def open(self) -> None:
        """Open store and catalogue and clear up what a crash left. Raises StartupError."""
        self._opened = await asyncio.to_thread(self._open)
        store, catalogue, _ = self._opened
        self._entries = {entry.name: entry for entry in catalogue.entries()}
        for name, entry in self._entries.items():
            if not store.contains(entry.spec.revision):
                self._failed[name] = "its files are gone from the adapter store; upload it again or delete it"
                log.error("adapter %s is not served: %s", name, self._failed[name])

    def _open(self) -> tuple[AdapterStore, Catalogue, BaseShape]:
        settings = self._settings.engine
        shape = base_shape(read_config(Path(settings.base), settings.base_name))
        path = self._settings.data_dir / "catalogue.sqlite3"
        _check_not_lost(path, Path(settings.store))
        # The catalogue first: its lock keeps a second server from touching the store.
        catalogue = Catalogue(path)
        try:
            store = AdapterStore(Path(settings.store), self._limits)
            for revision in store.prune({entry.spec.revision for entry in catalogue.entries()}):
                log.info("removed adapter content %s, which no name uses", revision[:12])
        except StorageFailed as error:
            catalogue.close()
            raise StartupError(error.message) from error
        return store, catalogue, shape

    async def close(self) -> None:
        """After the engine was closed: let what is under way end, then let go of the catalogue."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._opened:
            await asyncio.to_thread(self._opened[1].close)

    # ---- what is there -----------------------------------------------------------------------------------------------

    def list(self) -> tuple[AdapterInfo, ...]:
        """All names, sorted; also those that cannot be served, with the reason."""
        return tuple(self._info(name) for name in sorted({*self._entries, *self._failed}))

    def describe(self, name: str) -> AdapterInfo:
        """One name. Raises ModelNotFound with the names that there are."""
        if name not in self._entries and name not in self._failed:
            raise self._unknown(name)
        return self._info(name)

    def resolve(self, name: str) -> str | None:
        """The revision that serves this name now, None for the base. Raises ModelNotFound."""
        if name in self._base_names:
            return None
        if name in self._failed:
            raise ModelNotFound(f"the adapter '{name}' cannot be served: {self._failed[name]}", param="model")
        entry = self._entries.get(name)
        if entry is None:
            raise self._unknown(name)
        return entry.spec.revision

    def virtual_tokens(self, name: str) -> int:
        """Tokens of the soft prompt that stands before every prompt of this name; 0 for all other kinds."""
        entry = self._entries.get(name)
        return 0 if entry is None else entry.spec.virtual_tokens

    def begin_use(self, name: str, revision: str) -> None:
        """A row of this name is submitted: the revision stays until `end_use`."""
        self._uses.begin(name, revision)
        self._resident[revision] = self._engine.state.restarts

    def end_use(self, name: str, revision: str) -> None:
        """The row has ended; once for each `begin_use`."""
        self._uses.end(name, revision)

    def _unknown(self, name: str) -> ModelNotFound:
        names = [self._base_names[0], *sorted(set(self._entries) - set(self._failed))]
        more = f" and {len(names) - NAMES_TOLD} more" if len(names) > NAMES_TOLD else ""
        return ModelNotFound(
            f"the model {str(name)[:100]!a} does not exist; there are: {', '.join(names[:NAMES_TOLD])}{more}",
            param="model",
        )

    def _info(self, name: str) -> AdapterInfo:
        entry = self._entries.get(name)
        if entry is None:
            return AdapterInfo(name, "", "", 0, (), 0, 0, "", "folder", 0.0, "failed", reason=self._failed[name])
        spec = entry.spec
        state: AdapterState = "ready"
        if name in self._failed:
            state = "failed"
        elif self._resident.get(spec.revision) == self._engine.state.restarts:
            state = "resident"
        return AdapterInfo(
            name=name,
            revision=spec.revision,
            kind=spec.kind,
            rank=spec.rank,
            targets=spec.targets,
            nbytes=spec.nbytes,
            parameters=spec.parameters,
            base_model=spec.base_model,
            source=entry.source,
            created=entry.created,
            state=state,
            running=self._uses.rows(name),
            reason=self._failed.get(name, ""),
            virtual_tokens=spec.virtual_tokens,
            bottleneck_size=spec.bottleneck_size,
        )

    # ---- what changes ------------------------------------------------------------------------------------------------

    def staging(self) -> AbstractContextManager[Path]:
        """A folder of the caller's own for an upload, gone with what is left in it at the end of the `with`."""
        return self._open_store()[0].staging()

    async def upload(self, name: str, staging: Path) -> AdapterInfo:
        """Serve the PEFT folder `staging` under this name, in place of what it named before.

        When this returns the adapter is durable and proved. Raises InvalidRequest, InvalidAdapter, Conflict,
        StorageFailed, Unavailable.
        """
        return await self._finished(self._install(name, staging, "upload"))

    async def load_folder(self, name: str, folder: Path) -> AdapterInfo:
        """The same for a folder of the operator's; content that the name has already is not loaded again."""
        return await self._finished(self._install(name, folder, "folder", skip_same=True))

    async def install_trained(self, name: str, folder: Path) -> AdapterInfo:
        """The same for what a fine-tuning job has made."""
        return await self._finished(self._install(name, folder, "trainer"))

    async def load_path(self, name: str, path: str) -> AdapterInfo:
        """The same for a path that a client sent: only inside the configured adapter folder."""
        return await self.load_folder(name, await asyncio.to_thread(self._inside, path))

    async def unload(self, name: str) -> AdapterInfo:
        """Forget the name. Rows under way finish; no later request reaches it; its content goes with its last use.

        Raises ModelNotFound with the names that there are, Conflict for the base, StorageFailed with nothing changed.
        """
        return await self._finished(self._unload(name))

    async def load_folders(self, folders: Mapping[str, Path]) -> None:
        """Serve each folder under its name, unless a client has put another adapter there since: that one was promised
        to stay. A folder that is refused is logged, and listed as failed with the reason.
        """
        for name, folder in folders.items():
            before = self._entries.get(name)
            if before and before.source != "folder" and name not in self._failed:
                log.warning(
                    "the adapter folder %a is not served: '%s' is an upload; delete it first", str(folder), name
                )
                continue
            try:
                await self.load_folder(name, folder)
            except AdaplexError as error:
                log.error("the adapter folder %a is not served: %s", name, error.message)
                if _is_name(name) and name not in self._entries and name not in self._base_names:
                    self._failed[name] = error.message

    async def _install(self, name: str, folder: Path, source: str, *, skip_same: bool = False) -> AdapterInfo:
        """Read, store, prove, record; then the name points at the new revision, and the old one may go."""
        self._check_free(name)
        _, _, shape = self._open_store()
        async with self._installing, self._name_locks.hold(name):
            adapter = await asyncio.to_thread(read_adapter, folder, shape, self._limits)
            spec = adapter.spec
            before = self._entries.get(name)
            if skip_same and before and before.spec.revision == spec.revision and name not in self._failed:
                return self._info(name)
            try:
                proof = await self._place(name, adapter, source)
            except BaseException:
                await self._retire(spec.revision)
                raise
            del adapter
            log.info(
                "adapter %s is revision %s, loaded and proved in %.3f s (its logits differ from the base's by %.3g)",
                name, spec.revision[:12], proof.seconds, proof.max_logit_difference,
            )  # fmt: skip
            if before:
                await self._retire(before.spec.revision)
            return self._info(name)

    async def _place(self, name: str, adapter: Adapter, source: str) -> AdapterLoaded:
        """Store, prove and record under the name's lock; nobody drops the revision meanwhile."""
        store, catalogue, _ = self._open_store()
        spec = adapter.spec
        self._uses.begin(None, spec.revision)
        try:
            async with self._revision_locks.hold(spec.revision):
                await asyncio.to_thread(store.commit, adapter)
                proof = await self._engine.link().load(spec.revision)
                self._entries[name] = await asyncio.to_thread(catalogue.put, name, spec, source)
        finally:
            self._uses.end(None, spec.revision)
        self._failed.pop(name, None)
        self._resident[spec.revision] = self._engine.state.restarts
        return proof

    async def _unload(self, name: str) -> AdapterInfo:
        if name in self._base_names:
            raise Conflict(f"'{name}' is the base and cannot be unloaded", param="name")
        _, catalogue, _ = self._open_store()
        async with self._name_locks.hold(name):
            info = self.describe(name)
            if name in self._entries:
                await asyncio.to_thread(catalogue.remove, name)
            entry = self._entries.pop(name, None)
            self._failed.pop(name, None)
            log.info("adapter %s is unloaded (revision %s, %d rows running)", name, info.revision[:12], info.running)
            if entry:
                await self._retire(entry.spec.revision)
            return info

    def _on_idle(self, revision: str) -> None:
        if not self._wanted(revision):
            self._spawn(self._retire(revision))

    def _wanted(self, revision: str) -> bool:
        return self._uses.busy(revision) or any(e.spec.revision == revision for e in self._entries.values())

    async def _retire(self, revision: str) -> None:
        """Drop the revision from engine and store, if nobody wants it.

        What cannot be deleted is pruned at the next start.
        """
        async with self._revision_locks.hold(revision):
            store = self._open_store()[0]
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

    def _check_free(self, name: str) -> None:
        check_name(name)
        if name.lower() in {taken.lower() for taken in self._base_names}:
            raise Conflict(f"'{name}' is a name of the base; choose another for the adapter", param="name")

    def _inside(self, path: str) -> Path:
        root = self._settings.adapters_dir
        if root is None:
            raise InvalidRequest(
                "this server has no adapter folder (--adapters); upload the files instead", param="path"
            )
        try:
            root = root.resolve()
            found = (root / path).resolve()
            is_folder = found.is_dir()
        except (OSError, ValueError, RuntimeError) as error:
            raise InvalidRequest("the path is not one that can be opened", param="path") from error
        if root not in found.parents:
            raise InvalidRequest("the path is not inside the server's adapter folder", param="path")
        if not is_folder:
            raise NotFound("there is no such folder in the server's adapter folder", param="path")
        return found

    def _open_store(self) -> tuple[AdapterStore, Catalogue, BaseShape]:
        if self._opened is None:
            raise Unavailable("the server is starting; try again in a moment", retry_after=5.0)
        return self._opened

    # ---- tasks -------------------------------------------------------------------------------------------------------

    async def _finished(self, work: Coroutine[Any, Any, T]) -> T:
        """Do all of it, even if who asked goes away meanwhile: half a change is worse than one that nobody awaits."""
        return await asyncio.shield(self._spawn(work))

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, AdaplexError):
            log.error("a change of the adapters failed", exc_info=error)


def _check_not_lost(catalogue: Path, store: Path) -> None:
    """Raise StartupError if there are adapters but no catalogue: a new, empty one would have them all pruned."""
    revisions = store / "revisions"
    try:
        stored = 0 if catalogue.exists() or not revisions.is_dir() else sum(1 for _ in revisions.iterdir())
    except OSError as error:
        raise StartupError(f"The adapter store cannot be read ({error.strerror}).") from error
    if stored:
        raise StartupError(
            f"The catalogue {catalogue.name} is gone, but the store '{store.name}' beside it holds {stored} adapters. "
            f"Nothing was changed: restore {catalogue.name} from a backup, or move '{store.name}' away and load the "
            "adapters again."
        )


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except InvalidRequest:
        return False
    return True
