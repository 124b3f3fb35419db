"""`FineTuning`: what clients do with jobs. A job's row is on the disk before anything is acknowledged."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from adaplex_adapters.errors import Conflict, Unavailable
from adaplex_adapters.names import check_name
from adaplex_server.service.training.figures import TrainingFigures
from adaplex_server.service.training.file_store import FileStore
from adaplex_server.service.training.job_store import JobStore
from adaplex_server.service.training.ledger import Ledger
from adaplex_server.service.training.runner import JobRunner, Register
from adaplex_server.service.training.settings import TrainingSettings
from adaplex_server.service.training.types import ENDED, Job, JobEvent, Origin, word

_MOST_WAITING = 1000


class FineTuning:
    """Owns the ledger of jobs and their runner. `open` once, `close` once. register: as for `JobRunner`."""

    def __init__(self, settings: TrainingSettings, register: Register) -> None:
        self._settings = settings
        self._register = register
        self._opened: tuple[Ledger, JobRunner] | None = None

    async def open(self) -> None:
        """Open the store and go on with what was under way. Raises StartupError, StorageFailed."""
        ledger = await asyncio.to_thread(self._open)
        self._opened = (ledger, JobRunner(self._settings, ledger, self._register))

    def _open(self) -> Ledger:
        ledger = Ledger(self._settings.folder)
        for job in ledger.rows.jobs():
            if job.status == "running":
                said = word("The server was started again; the job goes on.")
                ledger.rows.record(replace(job, status="queued"), [said])
        return ledger

    async def close(self) -> None:
        """Have the running job keep a checkpoint; it goes on at the next start."""
        if self._opened:
            ledger, runner = self._opened
            await runner.close()
            await asyncio.to_thread(ledger.rows.close)

    @property
    def rows(self) -> JobStore:
        """Raises Unavailable while the server starts."""
        return self._parts()[0].rows

    @property
    def files(self) -> FileStore:
        """Raises Unavailable while the server starts."""
        return self._parts()[0].files

    def origin(self, revision: str) -> Origin | None:
        """Of an adapter that a job here has made."""
        rows = self.rows
        job = next((one for one in rows.jobs() if one.revision == revision), None)
        if job is None:
            return None
        files = {file.id: file.digest for file in rows.files()}
        return Origin(job.id, job.base, job.training_file, files.get(job.training_file))

    def watch(self, job_id: str) -> AsyncIterator[JobEvent]:
        """Every event of a job, those to come included, until it has ended or is paused. Raises NotFound."""
        return self._parts()[0].watch(job_id)

    async def create(
        self,
        *,
        training_file: str,
        validation_file: str | None,
        adapter: str | None,
        options: Mapping[str, Any],
        seed: int | None,
        register_worse: bool,
        owner: str | None,
        metadata: Mapping[str, str],
    ) -> Job:
        """A job, queued durably. Raises NotFound for a file, InvalidRequest for a name."""
        for file_id in filter(None, (training_file, validation_file)):
            self.rows.file(file_id)
        job_id = f"ftjob-{secrets.token_hex(12)}"
        name = check_name(adapter) if adapter else f"{self._settings.base_name[:60]}-{job_id[-8:]}"
        if sum(job.status not in ENDED for job in self.rows.jobs()) >= _MOST_WAITING:
            raise Conflict(f"{_MOST_WAITING} jobs wait already; cancel some of them first")
        job = Job(
            id=job_id,
            created=time.time(),
            base=self._settings.base_name,
            adapter=name,
            training_file=training_file,
            validation_file=validation_file,
            options=dict(options),
            seed=secrets.randbelow(1 << 31) if seed is None else seed,
            register_worse=register_worse,
            owner=owner,
            metadata=dict(metadata),
        )
        ledger, runner = self._parts()
        await ledger.add(job, word(f"Created job {job_id} for the adapter '{name}'."))
        runner.wake()
        return job

    def figures(self) -> TrainingFigures | None:
        """For a scrape; reads the disk. None while the server starts."""
        if self._opened is None:
            return None
        rows = self._opened[0].rows
        return TrainingFigures(rows.counts(), rows.running())

    async def cancel(self, job_id: str) -> Job:
        """End a job that has not ended. Raises NotFound, Conflict."""
        return await self._stop(job_id, "cancelled", "The job was cancelled.")

    async def pause(self, job_id: str) -> Job:
        """Keep a checkpoint and wait for `resume`. Raises NotFound, Conflict."""
        return await self._stop(job_id, "paused", "The job was paused.")

    async def resume(self, job_id: str) -> Job:
        """Queue a paused job again. Raises NotFound, Conflict."""
        ledger, runner = self._parts()
        job = await ledger.edit(job_id, word("The job was resumed."), only={"paused"}, status="queued")
        runner.wake()
        return job

    async def _stop(self, job_id: str, status: Any, message: str) -> Job:
        only = {"queued", "running", "paused"} - {status}
        finished = time.time() if status in ENDED else None
        ledger, runner = self._parts()
        job = await ledger.edit(job_id, word(message), only=only, status=status, finished=finished)
        runner.interrupt(job_id, kill=status == "cancelled")
        return job

    def _parts(self) -> tuple[Ledger, JobRunner]:
        if self._opened is None:
            raise Unavailable("the server is starting; try again in a moment", retry_after=5.0)
        return self._opened
