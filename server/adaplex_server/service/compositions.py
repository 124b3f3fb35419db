"""Adapters that are used together: made when first asked for, kept for a while, gone with the revision of a part.

A composition is identified by its parts' revisions and weights, never by their names: a part that is loaded again
makes it another one, and rows under way keep what they began with. It is stored and proved like every adapter, but
nothing of it outlives the process; a composition that shall is given a name of its own (`Registry.compose`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from adaplex_adapters.composition import Part, compose
from adaplex_adapters.errors import InvalidRequest, Overloaded
from adaplex_adapters.spec import Adapter
from adaplex_server.service.composed_name import NamedPart
from adaplex_server.service.keyed_locks import KeyedLocks
from adaplex_server.service.revisions import Revisions
from adaplex_server.service.tasks import Tasks

log = logging.getLogger(__name__)
MAX_UNUSED = 32
"""Compositions that are kept although no row uses them; the longest unused goes first."""
IDLE_SECONDS = 900.0
"""How long one is kept that nobody asks for."""
MAX_WAITING = 64
"""Requests that may wait for compositions to be made."""

Key = tuple[tuple[str, float], ...]
"""Revision and weight of each part."""


@dataclass(frozen=True)
class Resolved:
    """The parts of a composition, and the revisions that their names point at now."""

    parts: tuple[NamedPart, ...]
    revisions: tuple[str, ...]

    @property
    def key(self) -> Key:
        """What the composition is."""
        return tuple((revision, part.weight) for revision, part in zip(self.revisions, self.parts, strict=True))


@dataclass
class _Kept:
    revision: str
    used: float


class Compositions:
    """Owns which compositions there are. installing: bounds the adapters that are in memory at once. max_rank: of the
    engine.
    """

    def __init__(self, revisions: Revisions, tasks: Tasks, installing: asyncio.Semaphore, max_rank: int) -> None:
        self._revisions = revisions
        self._tasks = tasks
        self._installing = installing
        self._max_rank = max_rank
        self._kept: OrderedDict[Key, _Kept] = OrderedDict()
        self._making = KeyedLocks()
        self._waiting = 0
        self._timer: asyncio.TimerHandle | None = None
        revisions.keep(lambda revision: any(one.revision == revision for one in self._kept.values()))

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, wanted: Resolved) -> str | None:
        """Its revision, if it is made; it is then the last that will have to go."""
        kept = self._kept.get(wanted.key)
        if kept is None:
            return None
        kept.used = time.monotonic()
        self._kept.move_to_end(wanted.key)
        return kept.revision

    async def make(self, wanted: Resolved) -> None:
        """Make it unless it is there. Raises InvalidRequest when the parts cannot be used together, what the engine
        found, StorageFailed, Unavailable, Overloaded.
        """
        if self._waiting >= MAX_WAITING:
            raise Overloaded("too many requests wait for adapters to be composed; try again", retry_after=5.0)
        self._waiting += 1
        try:
            await self._tasks.finished(self._make(wanted))
        finally:
            self._waiting -= 1

    async def _make(self, wanted: Resolved) -> None:
        with self._revisions.holding(*wanted.revisions):
            async with self._making.hold(repr(wanted.key)):
                if self.find(wanted) is not None:
                    return
                async with self._installing:
                    adapter = await self.read(wanted)
                    async with self._revisions.placed(adapter) as proof:
                        self._kept[wanted.key] = _Kept(adapter.spec.revision, time.monotonic())
        log.info(
            "%s is revision %s, composed and proved in %.3f s",
            "+".join(f"{part.name}*{part.weight:g}" for part in wanted.parts), adapter.spec.revision[:12],
            proof.seconds,
        )  # fmt: skip
        self._trim()

    async def read(self, wanted: Resolved) -> Adapter:
        """The parts as one adapter; somebody holds their revisions."""
        adapter = await asyncio.to_thread(self._read, wanted.parts, wanted.revisions)
        if adapter.spec.rank > self._max_rank:
            raise InvalidRequest(
                f"these adapters together have the rank {adapter.spec.rank}; this server serves {self._max_rank}",
                param="model",
            )
        return adapter

    def _read(self, parts: Sequence[NamedPart], revisions: Sequence[str]) -> Adapter:
        store, shape = self._revisions.opened
        return compose(
            [
                Part(part.name, store.read(revision, shape), part.weight)
                for part, revision in zip(parts, revisions, strict=True)
            ]
        )

    def forget(self, part: str) -> None:
        """No name points at this revision any more: what was made of it is not asked for again."""
        for key in [key for key in self._kept if any(revision == part for revision, _ in key)]:
            self._drop(key)

    def close(self) -> None:
        """No more timers; what is stored is cleared up at the next start."""
        if self._timer is not None:
            self._timer.cancel()

    def _trim(self) -> None:
        """Let go of what is too old or too much, and look again later."""
        now = time.monotonic()
        unused = []
        for key, kept in self._kept.items():
            if self._revisions.busy(kept.revision):
                kept.used = now
            else:
                unused.append(key)
        for left, key in zip(range(len(unused), 0, -1), unused, strict=True):
            if left > MAX_UNUSED or now - self._kept[key].used >= IDLE_SECONDS:
                self._drop(key)
        self.close()
        self._timer = asyncio.get_running_loop().call_later(IDLE_SECONDS / 8, self._trim) if self._kept else None

    def _drop(self, key: Key) -> None:
        kept = self._kept.pop(key)
        self._tasks.spawn(self._revisions.retire(kept.revision))
