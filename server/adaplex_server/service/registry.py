"""Which name is served by which revision.

The registry owns the names in memory (a copy of the catalogue). A revision stays while a name points at it. Everything
that changes a name happens under that name's lock. A change that fails half-way leaves the names as they were.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from adaplex_adapters.catalogue import Catalogue, CatalogueEntry, Lineage
from adaplex_adapters.errors import (
    AdaplexError,
    Conflict,
    InvalidRequest,
    ModelNotFound,
    Unavailable,
)
from adaplex_adapters.names import check_name
from adaplex_adapters.reader import ReadLimits, read_adapter
from adaplex_adapters.spec import Adapter
from adaplex_server.service.composed_name import NamedPart, check_count, is_composed, parse_composed
from adaplex_server.service.compositions import Compositions, Resolved
from adaplex_server.service.data_folder import inside, open_data
from adaplex_server.service.engine_client import EngineClient
from adaplex_server.service.keyed_locks import KeyedLocks
from adaplex_server.service.revisions import Revisions
from adaplex_server.service.settings import ServiceSettings
from adaplex_server.service.tasks import Tasks
from adaplex_server.service.types import AdapterInfo, AdapterState

log = logging.getLogger(__name__)
NAMES_TOLD = 30
INSTALLATIONS = 2
"""Installations at once: each holds an adapter in memory."""


class Registry:
    """The adapters of a service. `open` before use; until then it is empty. tells_names: whether anybody may know all
    names, so that who asks for one that does not exist is told those that do.
    """

    def __init__(
        self, settings: ServiceSettings, engine: EngineClient, tells_names: Callable[[], bool] = lambda: True
    ) -> None:
        self._settings = settings
        self._tells_names = tells_names
        self._engine = engine
        self._base_names = (settings.engine.base_name, *settings.aliases)
        self._limits = ReadLimits(max_rank=settings.engine.max_rank, max_file_bytes=settings.max_adapter_bytes)
        self._entries: dict[str, CatalogueEntry] = {}
        self._failed: dict[str, str] = {}
        self._name_locks = KeyedLocks()
        self._installing = asyncio.Semaphore(INSTALLATIONS)
        self._tasks = Tasks()
        self._revisions = Revisions(engine, self._tasks)
        self._revisions.keep(self._named)
        self._compositions = Compositions(self._revisions, self._tasks, self._installing, settings.engine.max_rank)
        self._catalogue: Catalogue | None = None

    async def open(self) -> None:
        """Open store and catalogue and clear up what a crash left. Raises StartupError."""
        store, catalogue, shape = await asyncio.to_thread(open_data, self._settings, self._limits)
        self._revisions.open(store, shape)
        self._catalogue = catalogue
        self._entries = {entry.name: entry for entry in catalogue.entries()}
        for name, entry in self._entries.items():
            if not store.contains(entry.spec.revision):
                self._failed[name] = "its files are gone from the adapter store; upload it again or delete it"
                log.error("adapter %s is not served: %s", name, self._failed[name])

    async def close(self) -> None:
        """After the engine was closed: let what is under way end, then let go of the catalogue."""
        self._compositions.close()
        await self._tasks.close()
        if self._catalogue:
            await asyncio.to_thread(self._catalogue.close)

    # ---- what is there -----------------------------------------------------------------------------------------------

    def list(self) -> tuple[AdapterInfo, ...]:
        """All names, sorted; also those that cannot be served, with the reason."""
        return tuple(self._info(name) for name in sorted({*self._entries, *self._failed}))

    @property
    def count(self) -> int:
        """How many names `list` has."""
        return len(self._entries.keys() | self._failed.keys())

    def kind(self, name: str) -> str:
        """Of the adapter of this name: "base" for the base, "composition" for several, "" for one that is gone."""
        if name in self._base_names:
            return "base"
        entry = self._entries.get(name)
        return entry.spec.kind if entry is not None else "composition" if is_composed(name) else ""

    def describe(self, name: str) -> AdapterInfo:
        """One name. Raises ModelNotFound with the names that there are."""
        if name not in self._entries and name not in self._failed:
            raise self._unknown(name)
        return self._info(name)

    def resolve(self, name: str) -> str | None:
        """The revision that serves this name now, None for the base. Raises ModelNotFound.

        A composition has one from `prepare` on, until the event loop goes on.
        """
        if name in self._base_names:
            return None
        if not is_composed(name):
            return self._entry(name).spec.revision
        revision = self._compositions.find(self._resolved(parse_composed(name)))
        if revision is None:
            raise Unavailable("an adapter of the composition was changed just now; try again", retry_after=1.0)
        return revision

    def adapters_of(self, name: str) -> tuple[str, ...]:
        """The names of all adapters that are used under this one; () for the base. They need not exist.

        Raises InvalidRequest for what can be neither a name nor a composition.
        """
        if name in self._base_names:
            return ()
        return tuple(part.name for part in parse_composed(name)) if is_composed(name) else (name,)

    def virtual_tokens(self, name: str) -> int:
        """Tokens of the soft prompt that stands before every prompt of this name; 0 for all other kinds.

        Raises ModelNotFound for a name that cannot be served, InvalidRequest for the base in a composition.
        """
        if name in self._base_names:
            return 0
        parts = parse_composed(name) if is_composed(name) else (NamedPart(name),)
        return sum(entry.spec.virtual_tokens for entry in self._part_entries(parts))

    async def prepare(self, name: str) -> None:
        """See to it that `resolve` has a revision. At once for all but a composition that nobody has asked for lately.

        Raises ModelNotFound, InvalidRequest, Overloaded, Unavailable, StorageFailed.
        """
        if name in self._base_names or not is_composed(name):
            return
        parts = parse_composed(name)
        wanted = self._resolved(parts)
        while self._compositions.find(wanted) is None:
            await self._compositions.make(wanted)
            for revision in wanted.revisions:
                if not self._named(revision):  # it was loaded again meanwhile
                    self._compositions.forget(revision)
            wanted = self._resolved(parts)

    def begin_use(self, name: str, revision: str) -> None:
        """A row of this name is submitted: the revision stays until `end_use`."""
        self._revisions.begin_use(name, revision)

    def end_use(self, name: str, revision: str) -> None:
        """The row has ended; once for each `begin_use`."""
        self._revisions.end_use(name, revision)

    def _entry(self, name: str) -> CatalogueEntry:
        if name in self._failed:
            raise ModelNotFound(f"the adapter '{name}' cannot be served: {self._failed[name]}", param="model")
        entry = self._entries.get(name)
        if entry is None:
            raise self._unknown(name)
        return entry

    def _part_entries(self, parts: Sequence[NamedPart]) -> tuple[CatalogueEntry, ...]:
        for part in parts:
            if part.name in self._base_names:
                raise InvalidRequest(
                    f"'{part.name}' is the base, on which every adapter stands; a composition names adapters alone",
                    param="model",
                )
        return tuple(self._entry(part.name) for part in parts)

    def _resolved(self, parts: Sequence[NamedPart]) -> Resolved:
        return Resolved(tuple(parts), tuple(entry.spec.revision for entry in self._part_entries(parts)))

    def _named(self, revision: str) -> bool:
        return any(entry.spec.revision == revision for entry in self._entries.values())

    def _unknown(self, name: str) -> ModelNotFound:
        if not self._tells_names():
            return ModelNotFound(f"the model {str(name)[:100]!a} does not exist; list those that do", param="model")
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
        elif self._revisions.resident(spec.revision):
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
            running=self._revisions.rows(name),
            reason=self._failed.get(name, ""),
            virtual_tokens=spec.virtual_tokens,
            bottleneck_size=spec.bottleneck_size,
            parts=entry.parts,
        )

    # ---- what changes ------------------------------------------------------------------------------------------------

    def staging(self) -> AbstractContextManager[Path]:
        """A folder of the caller's own for an upload, gone with what is left in it at the end of the `with`."""
        return self._revisions.opened[0].staging()

    async def upload(self, name: str, staging: Path) -> AdapterInfo:
        """Serve the PEFT folder `staging` under this name, in place of what it named before.

        When this returns the adapter is durable and proved. Raises InvalidRequest, InvalidAdapter, Conflict,
        StorageFailed, Unavailable.
        """
        return await self._tasks.finished(self._install(name, self._reading(staging), "upload"))

    async def load_folder(self, name: str, folder: Path) -> AdapterInfo:
        """The same for a folder of the operator's; content that the name has already is not loaded again."""
        return await self._tasks.finished(self._install(name, self._reading(folder), "folder", skip_same=True))

    async def install_trained(self, name: str, folder: Path) -> AdapterInfo:
        """The same for what a fine-tuning job has made."""
        return await self._tasks.finished(self._install(name, self._reading(folder), "trainer"))

    async def compose(self, name: str, parts: Sequence[NamedPart]) -> AdapterInfo:
        """Serve these adapters together under a name of their own, as they are now: it is as durable as an upload, and
        stays what it is when one of them is loaded again.

        Raises ModelNotFound for a part, InvalidRequest when they cannot be used together, and what `upload` raises.
        """
        check_count(len(parts))
        wanted = self._resolved(parts)
        lineage = tuple(
            Lineage(part.name, part.weight, revision) for part, revision in zip(parts, wanted.revisions, strict=True)
        )

        async def install() -> AdapterInfo:
            with self._revisions.holding(*wanted.revisions):
                return await self._install(name, partial(self._compositions.read, wanted), "composition", lineage)

        return await self._tasks.finished(install())

    async def load_path(self, name: str, path: str) -> AdapterInfo:
        """The same for a path that a client sent: only inside the configured adapter folder."""
        return await self.load_folder(name, await asyncio.to_thread(inside, self._settings.adapters_dir, path))

    async def unload(self, name: str) -> AdapterInfo:
        """Forget the name. Rows under way finish; no later request reaches it; its content goes with its last use.

        Raises ModelNotFound with the names that there are, Conflict for the base, StorageFailed with nothing changed.
        """
        return await self._tasks.finished(self._unload(name))

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

    async def _install(
        self,
        name: str,
        read: Callable[[], Awaitable[Adapter]],
        source: str,
        parts: tuple[Lineage, ...] = (),
        *,
        skip_same: bool = False,
    ) -> AdapterInfo:
        """Read, store, prove, record; then the name points at the new revision, and the old one may go."""
        self.check_free(name)
        catalogue = self._open_catalogue()
        async with self._installing, self._name_locks.hold(name):
            adapter = await read()
            spec = adapter.spec
            before = self._entries.get(name)
            if skip_same and before and before.spec.revision == spec.revision and name not in self._failed:
                return self._info(name)
            try:
                async with self._revisions.placed(adapter) as proof:
                    self._entries[name] = await asyncio.to_thread(catalogue.put, name, spec, source, parts)
            except BaseException:
                await self._revisions.retire(spec.revision)
                raise
            self._failed.pop(name, None)
            del adapter
            log.info(
                "adapter %s is revision %s, loaded and proved in %.3f s (its logits differ from the base's by %.3g)",
                name, spec.revision[:12], proof.seconds, proof.max_logit_difference,
            )  # fmt: skip
            if before:
                await self._let_go(before.spec.revision)
            return self._info(name)

    def _reading(self, folder: Path) -> Callable[[], Awaitable[Adapter]]:
        """Reads a PEFT folder in a thread, when called."""

        def read() -> Awaitable[Adapter]:
            return asyncio.to_thread(read_adapter, folder, self._revisions.opened[1], self._limits)

        return read

    async def _let_go(self, revision: str) -> None:
        """A name has ceased to point at this revision."""
        if not self._named(revision):
            self._compositions.forget(revision)
        await self._revisions.retire(revision)

    async def _unload(self, name: str) -> AdapterInfo:
        if name in self._base_names:
            raise Conflict(f"'{name}' is the base and cannot be unloaded", param="name")
        catalogue = self._open_catalogue()
        async with self._name_locks.hold(name):
            info = self.describe(name)
            if name in self._entries:
                await asyncio.to_thread(catalogue.remove, name)
            entry = self._entries.pop(name, None)
            self._failed.pop(name, None)
            log.info("adapter %s is unloaded (revision %s, %d rows running)", name, info.revision[:12], info.running)
            if entry:
                await self._let_go(entry.spec.revision)
            return info

    def check_free(self, name: str) -> None:
        """Raises InvalidRequest or Conflict for what no adapter can be called here."""
        check_name(name)
        if name.lower() in {taken.lower() for taken in self._base_names}:
            raise Conflict(f"'{name}' is a name of the base; choose another for the adapter", param="name")

    def _open_catalogue(self) -> Catalogue:
        if self._catalogue is None:
            raise Unavailable("the server is starting; try again in a moment", retry_after=5.0)
        return self._catalogue


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except InvalidRequest:
        return False
    return True
