"""`JobStore` owns the durable rows of files, jobs, their events and checkpoints. A change that returned is on the disk.

Written by the API process alone, under the lock that the catalogue beside it holds.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adaplex_adapters.database import Schema, changing, open_database, sqlite_errors
from adaplex_adapters.errors import NotFound
from adaplex_server.service.training.figures import RunningJob, running_job
from adaplex_server.service.training.types import Checkpoint, Job, JobError, JobEvent, StoredFile, Told

_SCHEMA = Schema(
    what="The file of training jobs",
    application=0x4144504A,  # "ADPJ"
    version=2,
    statements="""
    CREATE TABLE files (
        id TEXT PRIMARY KEY, filename TEXT NOT NULL, purpose TEXT NOT NULL, nbytes INTEGER NOT NULL,
        digest TEXT NOT NULL, created REAL NOT NULL, owner TEXT
    ) STRICT;
    CREATE TABLE jobs (id TEXT PRIMARY KEY, created REAL NOT NULL, status TEXT NOT NULL, body TEXT NOT NULL) STRICT;
    CREATE INDEX jobs_by_time ON jobs (created);
    CREATE TABLE events (
        job TEXT NOT NULL REFERENCES jobs (id), number INTEGER NOT NULL, created REAL NOT NULL, level TEXT NOT NULL,
        kind TEXT NOT NULL, message TEXT NOT NULL, data TEXT NOT NULL, PRIMARY KEY (job, number)
    ) STRICT;
    CREATE TABLE checkpoints (
        job TEXT NOT NULL REFERENCES jobs (id), step INTEGER NOT NULL, created REAL NOT NULL, metrics TEXT NOT NULL,
        PRIMARY KEY (job, step)
    ) STRICT;
    """,
    upgrades={1: "ALTER TABLE files ADD COLUMN owner TEXT;"},
    advice="restore it from a backup, or move it and the folders 'files' and 'jobs' beside it away.",
)
_FILE_COLUMNS = "id, filename, purpose, nbytes, digest, created, owner"


class JobStore:
    """Any thread may call; calls are done one after another. Raises StorageFailed, and StartupError when opened."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._connection = open_database(path, _SCHEMA)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    # ---- files -------------------------------------------------------------------------------------------------------

    def add_file(self, file: StoredFile) -> None:
        with self._lock, changing(self._connection, "Recording the file") as connection:
            values = (file.id, file.filename, file.purpose, file.nbytes, file.digest, file.created, file.owner)
            connection.execute(f"INSERT INTO files ({_FILE_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def file(self, file_id: str) -> StoredFile:
        """Raises NotFound."""
        rows = self._select(f"SELECT {_FILE_COLUMNS} FROM files WHERE id = ?", file_id)
        if not rows:
            raise no_file(file_id)
        return StoredFile(*rows[0])

    def files(self) -> tuple[StoredFile, ...]:
        """All, the newest first."""
        return tuple(
            StoredFile(*row) for row in self._select(f"SELECT {_FILE_COLUMNS} FROM files ORDER BY created DESC")
        )

    def remove_file(self, file_id: str) -> None:
        with self._lock, changing(self._connection, "Forgetting the file") as connection:
            connection.execute("DELETE FROM files WHERE id = ?", (file_id,))

    # ---- jobs --------------------------------------------------------------------------------------------------------

    def record(self, job: Job, told: Sequence[Told] = (), checkpoints: Sequence[Checkpoint] = ()) -> None:
        """A new job, or the new state of one, with what is to be told of it: all of that or nothing."""
        with self._lock, changing(self._connection, "Recording the job") as connection:
            connection.execute(
                "INSERT INTO jobs (id, created, status, body) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET status = excluded.status, body = excluded.body",
                (job.id, job.created, job.status, json.dumps(asdict(job))),
            )
            query = "SELECT coalesce(max(number), 0) FROM events WHERE job = ?"
            (last,) = connection.execute(query, (job.id,)).fetchone()
            for number, one in enumerate(told, last + 1):
                values = (job.id, number, one.created, one.level, one.kind, one.message, json.dumps(dict(one.data)))
                connection.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", values)
            for saved in checkpoints:
                state = (saved.job, saved.step, saved.created, json.dumps(dict(saved.metrics)))
                connection.execute("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?)", state)

    def job(self, job_id: str) -> Job:
        """Raises NotFound."""
        rows = self._select("SELECT body FROM jobs WHERE id = ?", job_id)
        if not rows:
            raise no_job(job_id)
        return _job(rows[0][0])

    def jobs(self) -> tuple[Job, ...]:
        """All, the newest first."""
        return tuple(_job(body) for (body,) in self._select("SELECT body FROM jobs ORDER BY created DESC, id DESC"))

    def counts(self) -> dict[str, int]:
        """How many jobs have each status, of those that any has."""
        return dict(self._select("SELECT status, count(*) FROM jobs GROUP BY status"))

    def running(self) -> tuple[RunningJob, ...]:
        """Jobs that run now, each with what it told of its last step."""
        found = []
        for body in self._select("SELECT body FROM jobs WHERE status = 'running'"):
            job = _job(*body)
            query = "SELECT data FROM events WHERE job = ? AND kind = 'metrics' ORDER BY number DESC LIMIT 5"
            told = [json.loads(data) for (data,) in self._select(query, job.id)]
            found.append(running_job(job.adapter, next((one for one in told if "loss" in one), {})))
        return tuple(found)

    # ---- what they have told -----------------------------------------------------------------------------------------

    def events(self, job: str, after: int = 0, limit: int = 1000) -> tuple[JobEvent, ...]:
        """In the order in which they happened, from the one after number `after`."""
        query = "SELECT * FROM events WHERE job = ? AND number > ? ORDER BY number LIMIT ?"
        return tuple(_event(row) for row in self._select(query, job, after, limit))

    def last_events(self, job: str, before: int | None, limit: int) -> tuple[JobEvent, ...]:
        """The newest first, as OpenAI lists them, from the one before number `before`."""
        query = "SELECT * FROM events WHERE job = ? AND number < ? ORDER BY number DESC LIMIT ?"
        return tuple(_event(row) for row in self._select(query, job, before or 1 << 62, limit))

    def checkpoints(self, job: str) -> tuple[Checkpoint, ...]:
        """The newest first."""
        rows = self._select("SELECT * FROM checkpoints WHERE job = ? ORDER BY step DESC", job)
        return tuple(Checkpoint(name, step, created, json.loads(metrics)) for name, step, created, metrics in rows)

    # ------------------------------------------------------------------------------------------------------------------

    def _select(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, sqlite_errors("Reading the training jobs"):
            return self._connection.execute(query, values).fetchall()


def no_file(file_id: str) -> NotFound:
    """In the words that hide whether it is somebody else's."""
    return NotFound(f"There is no file {file_id[:60]!a}; GET /v1/files lists them.", param="file_id")


def no_job(job_id: str) -> NotFound:
    """The same of a job."""
    return NotFound(f"There is no fine-tuning job {job_id[:60]!a}.", param="fine_tuning_job_id")


def _job(body: str) -> Job:
    values = json.loads(body)
    error = values["error"]
    values["error"] = None if error is None else JobError(**error)
    values["result_files"] = tuple(values["result_files"])
    return Job(**values)


def _event(row: tuple[Any, ...]) -> JobEvent:
    job, number, created, level, kind, message, data = row
    return JobEvent(job, number, Told(created, level, kind, message, json.loads(data)))
