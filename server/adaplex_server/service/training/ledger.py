"""`Ledger` owns the state of all jobs: each change of one is made and recorded as a whole, and watchers are told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaplex_adapters.errors import Conflict
from adaplex_server.service.training.file_store import FileStore
from adaplex_server.service.training.job_store import JobStore
from adaplex_server.service.training.types import ENDED, Checkpoint, Job, JobEvent, Told

_PATIENCE_SECONDS = 2.0


class Ledger:
    """The rows and files in `folder`. Made in a thread, since it reads the disk; used on the event loop. Raises
    StartupError, StorageFailed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = JobStore(folder / "jobs.sqlite3")
        self.files = FileStore(folder / "files", self.rows)
        self._changed = asyncio.Condition()
        # Held from reading a job to recording its new state.
        self._editing = asyncio.Lock()
        self._sealed: set[str] = set()

    def job_folder(self, job_id: str) -> Path:
        """Where a job's process works."""
        return self.folder / "jobs" / job_id

    async def add(self, job: Job, *words: Told) -> None:
        """Record a new job."""
        await asyncio.to_thread(self.rows.record, job, words)

    async def edit(
        self,
        job_id: str,
        *words: Told,
        only: Collection[str] | None = None,
        by_client: bool = False,
        checkpoints: Sequence[Checkpoint] = (),
        **fields: Any,
    ) -> Job:
        """Record a job's new fields and what is to be told of them. Raises Conflict unless its status is one of
        `only`, or if a client wants to change one that is sealed.
        """
        async with self._editing:
            job = self.rows.job(job_id)
            if by_client and job_id in self._sealed:
                raise Conflict(f"the job {job_id} is trained and its adapter is being registered: it ends in a moment")
            if only is not None and job.status not in only:
                raise Conflict(f"the job {job_id} is {job.status}; this needs one that is {' or '.join(sorted(only))}")
            job = replace(job, **fields)
            await asyncio.to_thread(self.rows.record, job, words, checkpoints)
        async with self._changed:
            self._changed.notify_all()
        return job

    @asynccontextmanager
    async def sealed(self, job_id: str, only: Collection[str]) -> AsyncIterator[None]:
        """No client changes the job for the time of the `with`. Raises Conflict unless its status is one of `only`."""
        self._sealed.add(job_id)
        try:
            await self.edit(job_id, only=only)  # after what clients have begun to change
            yield
        finally:
            self._sealed.discard(job_id)

    async def watch(self, job_id: str) -> AsyncIterator[JobEvent]:
        """Every event of a job, those to come included, until it has ended or is paused."""
        number = 0
        while True:
            job = self.rows.job(job_id)
            for event in self.rows.events(job_id, number):
                number = event.number
                yield event
            if (job.status in ENDED or job.status == "paused") and not self.rows.events(job_id, number, 1):
                return
            async with self._changed:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), _PATIENCE_SECONDS)
