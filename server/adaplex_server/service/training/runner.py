"""`JobRunner` trains queued jobs one after another, each in a process of its own, and says what became of it.

Whatever dies (this process, the trainer, the machine), a job that was under way is queued again at the next start and
goes on from its last checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from adaplex_adapters.durable import disk_errors
from adaplex_adapters.errors import AdaplexError, Conflict, StorageFailed, Unavailable, error_named
from adaplex_adapters.training.job_terms import EVENTS, FAILED, JOB, PAUSED, RESULT, SUCCEEDED, VERSION
from adaplex_server.service.training import told
from adaplex_server.service.training.ledger import Ledger
from adaplex_server.service.training.settings import TrainingSettings
from adaplex_server.service.training.trainer_process import TrainerProcess
from adaplex_server.service.training.types import Checkpoint, Job, JobError, Told, word

log = logging.getLogger(__name__)
_POLL_SECONDS = 0.5
_REPORTS = (".html", ".md", ".png")

Register = Callable[[str, Path], Awaitable[str]]


class JobRunner:
    """register(name, folder): serve a trained folder under a name; returns its revision."""

    def __init__(self, settings: TrainingSettings, ledger: Ledger, register: Register) -> None:
        self._settings = settings
        self._ledger = ledger
        self._register = register
        self._wake = asyncio.Event()
        self._running: tuple[str, TrainerProcess] | None = None
        self._closing = False
        self._worker = asyncio.create_task(self._work(), name="fine-tuning")

    def wake(self) -> None:
        """A job has been queued."""
        self._wake.set()

    def interrupt(self, job_id: str, *, kill: bool) -> bool:
        """If this job is being trained, end its process: at once, or after it has kept a checkpoint. False: it is not,
        and nobody here clears up after it.
        """
        if self._running and self._running[0] == job_id:
            self._running[1].kill() if kill else self._running[1].pause()
        return self._running is not None and self._running[0] == job_id

    async def close(self) -> None:
        """Have the running job keep a checkpoint; it goes on at the next start."""
        self._closing = True
        self._wake.set()
        if self._running:
            self._running[1].pause()
        with contextlib.suppress(asyncio.CancelledError):
            await self._worker

    async def _work(self) -> None:
        while not self._closing:
            try:
                queued = [job for job in self._ledger.rows.jobs() if job.status == "queued"]
                if not queued:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                await self._train_or_fail(min(queued, key=lambda one: (one.created, one.id)))
            except StorageFailed as error:  # nothing can be recorded now: the jobs are worth waiting for
                log.error("training waits for the disk: %s", error.message)
                await asyncio.sleep(self._settings.retry_seconds)

    async def _train_or_fail(self, job: Job) -> None:
        try:
            await self._train(job)
        except Conflict:  # it was paused or cancelled meanwhile
            if self._ledger.rows.job(job.id).status == "cancelled":
                await asyncio.to_thread(shutil.rmtree, self._ledger.job_folder(job.id), ignore_errors=True)
        except StorageFailed as error:
            log.error("the job %s could not be recorded: %s", job.id, error.message)
            await self._later(job.id)
        except AdaplexError as error:
            await self._fail(job.id, JobError(error.code or "error", error.message, error.param))
        except Exception:
            log.exception("a bug: the job %s could not be run", job.id)
            await self._fail(job.id, JobError("internal_error", "the server has a bug; its log has the trace"))

    async def _later(self, job_id: str) -> None:
        """The disk failed: queue the job again as soon as that can be recorded, unless it has failed too often."""
        while not self._closing:
            await asyncio.sleep(self._settings.retry_seconds)
            with contextlib.suppress(StorageFailed):
                job = self._ledger.rows.job(job_id)
                if job.attempts >= self._settings.attempts:
                    message = f"the disk failed while the job was trained, {job.attempts} times"
                    return await self._fail(job_id, JobError("storage_failed", message))
                said = word("The disk failed; the job goes on from its last checkpoint.", "warn")
                with contextlib.suppress(Conflict):
                    await self._ledger.edit(job_id, said, only={"running", "queued"}, status="queued")
                return None
        return None

    async def _train(self, job: Job) -> None:
        """One life of a job's process, from its start to what its end means. Raises Conflict when a client has changed
        the job's state meanwhile.
        """
        folder = self._ledger.job_folder(job.id)
        await asyncio.to_thread(self._prepare, job, folder)
        said = word("The job goes on." if job.attempts else "The job is being trained.")
        began, attempts = job.started or time.time(), job.attempts + 1
        job = await self._ledger.edit(job.id, said, only={"queued"}, status="running", started=began, attempts=attempts)
        process = await TrainerProcess.start(self._settings.command, folder)
        self._running = (job.id, process)
        if self._closing or self._ledger.rows.job(job.id).status != "running":
            process.pause()
        ending = asyncio.create_task(process.ended())
        last: told.Line | None = None
        try:
            while not ending.done():
                await asyncio.wait({ending}, timeout=_POLL_SECONDS)
                last = await self._listen(job.id) or last
        finally:
            process.kill()
            self._running = None
        last = await self._listen(job.id) or last
        await self._settle(self._ledger.rows.job(job.id), folder, ending.result(), last, process.tail)

    async def _settle(self, job: Job, folder: Path, code: int, last: told.Line | None, tail: str) -> None:
        """What the end of a job's process means."""
        if job.status == "cancelled":
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        elif job.status != "running":
            return
        elif code == SUCCEEDED and (told_last := last or await self._told_last(job.id)).type == "succeeded":
            await self._finish(job, folder, told_last.result)
        elif code == PAUSED:
            said = word("The trainer was stopped; the job goes on later.")
            await self._ledger.edit(job.id, said, only={"running"}, status="queued", attempts=job.attempts - 1)
        elif code == FAILED and last is not None and last.type == "failed":
            error = error_named(last.error, last.message)
            await self._fail(job.id, JobError(error.code or error.type, last.message, last.param))
        else:
            await self._crashed(job, code, tail)

    async def _crashed(self, job: Job, code: int, tail: str) -> None:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        log.error("the trainer of %s ended with %s; it printed last:\n%s", job.id, how, tail)
        if job.attempts >= self._settings.attempts:
            message = f"the trainer crashed {job.attempts} times, at last with {how}; perhaps it needs more memory"
            await self._fail(job.id, JobError("trainer_crashed", message))
            return
        said = word(f"The trainer ended with {how}; it is started again from its last checkpoint.", "warn")
        await self._ledger.edit(job.id, said, only={"running"}, status="queued")
        await asyncio.sleep(self._settings.retry_seconds)

    async def _finish(self, job: Job, folder: Path, result: told.Result) -> None:
        """Register the result and record it. An engine that is being started again is waited for, as what took hours to
        train is not to be lost for that; meanwhile the job can be paused or cancelled. Raises Conflict then, and when
        the server closes: the job goes on at the next start.
        """
        while True:
            try:
                async with self._ledger.sealed(job.id, only={"running"}):
                    return await self._record(job, folder, result)
            except Unavailable as error:
                if self._closing:
                    raise Conflict("the server is shutting down") from error
                await asyncio.sleep(min(error.retry_after or 1.0, self._settings.retry_seconds))

    async def _record(self, job: Job, folder: Path, result: told.Result) -> None:
        """Register the result if it is wanted, keep its files, and only then say that the job has succeeded."""
        words, revision = [], None
        if result.better_than_base or job.register_worse:
            revision = await self._register(job.adapter, folder / RESULT)
            words.append(word(f"The adapter is served as '{job.adapter}'."))
        else:
            what = "On the held-out rows the adapter is no better than the base, so it is not served"
            words.append(word(f"{what}; register_worse: true would serve it.", "warn"))
        kept = await asyncio.to_thread(self._keep_files, job, folder)
        words.append(word("The job has successfully completed."))
        await self._ledger.edit(
            job.id, *words, only={"running"}, status="succeeded", finished=time.time(), revision=revision,
            result_files=kept, trained_tokens=result.tokens, estimated_finish=None,
        )  # fmt: skip

    def _keep_files(self, job: Job, folder: Path) -> tuple[str, ...]:
        """Report, card and plots as files of their own; the adapter itself is in the store, if it is served."""
        found = sorted(path for path in (folder / RESULT).iterdir() if path.suffix in _REPORTS)
        return tuple(self._ledger.files.take(path, path.name, "fine-tune-results", job.owner).id for path in found)

    async def _told_last(self, job_id: str) -> told.Line:
        """What the trainer has told at its end, where that was recorded in a former life of this server: it tells
        nothing twice.
        """
        batch = await asyncio.to_thread(told.read_lines, self._ledger.job_folder(job_id) / EVENTS, 0)
        return batch.lines[-1] if batch.lines else told.Line(0.0, "message")

    async def _listen(self, job_id: str) -> told.Line | None:
        """Record what the trainer has said since the last time; its last line."""
        path = self._ledger.job_folder(job_id) / EVENTS
        batch = await asyncio.to_thread(told.read_lines, path, self._ledger.rows.job(job_id).consumed)
        if not batch.lines:
            return None
        measured: told.Line | None = None
        words: list[Told] = []
        checkpoints: list[Checkpoint] = []
        fields: dict[str, Any] = {"consumed": batch.end}
        step = self._ledger.rows.job(job_id).step
        for line, raw in zip(batch.lines, batch.raw, strict=True):
            if line.type == "message":
                words.append(Told(line.at, "info", "message", line.text))
            elif line.type in ("step", "evaluation") and line.step is not None:
                # After a crash the steps since the last checkpoint are told again, with the same figures.
                if line.type == "step" and line.step <= step:
                    continue
                data = {name: value for name, value in raw.items() if name not in ("seq", "at")}
                words.append(Told(line.at, "info", "metrics", f"{line.type.capitalize()} {line.step}", data))
                step = max(step, line.step)
                if line.seconds_left is not None:
                    fields["estimated_finish"] = line.at + line.seconds_left
                measured = line if line.type == "evaluation" else measured
            elif line.type == "checkpoint" and line.step is not None:
                checkpoints.append(Checkpoint(job_id, line.step, line.at, _figures(measured, line.step)))
        fields["step"] = step
        await self._ledger.edit(job_id, *words, checkpoints=checkpoints, **fields)
        return batch.lines[-1]

    async def _fail(self, job_id: str, error: JobError) -> None:
        """Say so as soon as the disk takes it; what a client has made of the job meanwhile stands."""
        said, only = word(f"The job failed: {error.message}", "error"), {"running", "queued"}
        fields: dict[str, Any] = {"finished": time.time(), "error": error, "estimated_finish": None}
        while not self._closing:
            try:
                with contextlib.suppress(Conflict):
                    await self._ledger.edit(job_id, said, only=only, status="failed", **fields)
                return
            except StorageFailed:
                await asyncio.sleep(self._settings.retry_seconds)

    def _prepare(self, job: Job, folder: Path) -> None:
        """The job's folder, as its process wants to find it."""
        validation = job.validation_file and str(self._ledger.files.path(job.validation_file))
        told_job = {
            "version": VERSION,
            "data": str(self._ledger.files.path(job.training_file)),
            "validation": validation,
            "base": {"folder": str(self._settings.base), "name": self._settings.base_name},
            "out": RESULT,
            "options": {**job.options, "seed": job.seed},
            "device": self._settings.device,
            "memory_limit": self._settings.memory,
            "threads": self._settings.threads,
        }
        with disk_errors("Preparing the job"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / JOB).write_text(json.dumps(told_job))


def _figures(measured: told.Line | None, step: int) -> dict[str, float]:
    """Of a checkpoint, where it was measured."""
    if measured is None or measured.step != step:
        return {}
    found = {"loss": measured.loss, **measured.metrics}
    return {name: value for name, value in found.items() if value is not None}
