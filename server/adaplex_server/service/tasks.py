"""Work that is done to its end, whoever asked for it and left: half a change is worse than one that nobody awaits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from adaplex_adapters.errors import AdaplexError

log = logging.getLogger(__name__)
T = TypeVar("T")


class Tasks:
    """Owns the tasks under way, so that they can be waited for at the end."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def finished(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result. Cancelling who waits does not cancel the work."""
        return await asyncio.shield(self.spawn(work))

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin it; an error that is not one of ours is logged, since nobody may be waiting."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def close(self) -> None:
        """Let everything end, also what is begun meanwhile."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, AdaplexError):
            log.error("a change of the adapters failed", exc_info=error)
