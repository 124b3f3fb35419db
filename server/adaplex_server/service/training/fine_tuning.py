"""`FineTuning`: what clients do with jobs. A job's row is on the disk before anything is acknowledged."""

from __future__ import annotations

import asyncio
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any

from adaplex_adapters.errors import Conflict, InvalidRequest, Unavailable
from adaplex_adapters.names import check_name
from adaplex_server.caller import Caller
from adaplex_server.service.training.figures import TrainingFigures
from adaplex_server.service.training.file_store import FileStore
from adaplex_server.service.training.job_store import JobStore, no_file, no_job
from adaplex_server.service.training.ledger import Ledger
from adaplex_server.service.training.runner import JobRunner, Register
from adaplex_server.service.training.settings import TrainingSettings
from adaplex_server.service.training.types import ENDED, Job, JobEvent, Origin, StoredFile, word

_MOST_WAITING = 1000
_SEEDS = ("seed", "data_seed")


class FineTuning:
    """Owns the ledger of jobs and their runner. `open` once, `close` once. register: as for `JobRunner`.
    check_name: raises InvalidRequest or Conflict for what no adapter can be called.
    """

    def __init__(
        self, settings: TrainingSettings, register: Register, check_name: Callable[[str], object] = check_name
    ) -> None:
        self._settings = settings
        self._check_name = check_name
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

    @property
    def max_file_bytes(self) -> int:
        """Of a file that is uploaded, by whichever skin."""
        return self._settings.max_file_bytes

    def origin(self, revision: str) -> Origin | None:
        """Of an adapter that a job here has made."""
        rows = self.rows
        job = next((one for one in rows.jobs() if one.revision == revision), None)
        if job is None:
            return None
        files = {file.id: file.digest for file in rows.files()}
        return Origin(job.id, job.base, job.training_file, files.get(job.training_file))

    def files_of(self, caller: Caller) -> tuple[StoredFile, ...]:
        """Those that the caller may see, the newest first."""
        return tuple(file for file in self.rows.files() if caller.may_see(file.owner))

    def file(self, file_id: str, caller: Caller) -> StoredFile:
        """Raises NotFound, also for somebody else's."""
        found = self.rows.file(file_id)
        if not caller.may_see(found.owner):
            raise no_file(file_id)
        return found

    def jobs_of(self, caller: Caller) -> tuple[Job, ...]:
        """Those that the caller may see, the newest first."""
        return tuple(job for job in self.rows.jobs() if caller.may_see(job.owner))

    def job(self, job_id: str, caller: Caller) -> Job:
        """Raises NotFound, also for somebody else's."""
        found = self.rows.job(job_id)
        if not caller.may_see(found.owner):
            raise no_job(job_id)
        return found

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
        caller: Caller,
        metadata: Mapping[str, str],
    ) -> Job:
        """A job, queued durably. Raises NotFound for a file, InvalidRequest for a name or an option, Conflict for a
        name of the base.
        """
        for file_id in filter(None, (training_file, validation_file)):
            self.file(file_id, caller)
        self._settings.check_options(options)
        job_id = f"ftjob-{secrets.token_hex(12)}"
        name = adapter or _name_of(self._settings.base_name, job_id)
        self._check_name(name)
        if not caller.may_name(name):
            raise InvalidRequest(
                f"the key {caller.key} is for {', '.join(caller.models)}, and {name[:96]!a} is none of these: give the "
                "adapter a name that is",
                param="suffix",
            )
        if sum(job.status not in ENDED for job in self.rows.jobs()) >= _MOST_WAITING:
            raise Conflict(f"{_MOST_WAITING} jobs wait already; cancel some of them first")
        # Among the options a seed goes by two names; the job has it once.
        kept = {name: value for name, value in options.items() if name not in _SEEDS}
        given = seed if seed is not None else next((options[name] for name in _SEEDS if options.get(name)), None)
        job = Job(
            id=job_id,
            created=time.time(),
            base=self._settings.base_name,
            adapter=name,
            training_file=training_file,
            validation_file=validation_file,
            options=kept,
            seed=secrets.randbelow(1 << 31) if given is None else int(given),
            register_worse=register_worse,
            owner=caller.owner,
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
        job = await ledger.edit(job_id, word(message), only=only, by_client=True, status=status, finished=finished)
        if not runner.interrupt(job_id, kill=status == "cancelled") and status == "cancelled":
            await asyncio.to_thread(shutil.rmtree, ledger.job_folder(job_id), ignore_errors=True)
        return job

    def _parts(self) -> tuple[Ledger, JobRunner]:
        if self._opened is None:
            raise Unavailable("the server is starting; try again in a moment", retry_after=5.0)
        return self._opened


def _name_of(base: str, job_id: str) -> str:
    """A name for an adapter without one: the base's last part, as far as it can name an adapter, and the job's."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", base.rpartition("/")[2]).strip("-_")
    return f"{plain[:60] or 'adapter'}-{job_id[-8:]}"
