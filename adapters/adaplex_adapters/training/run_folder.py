"""The folder of one run: its log, its checkpoints, and the lock that keeps a second process away.

events.jsonl    what happened (see `events`)
checkpoints/    what it goes on from (see `checkpoints`)
tensorboard/    where asked for
lock            held (flock) by the process that trains, as long as it lives
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adaplex_adapters.durable import disk_errors
from adaplex_adapters.errors import Conflict
from adaplex_adapters.training.checkpoints import Checkpoints
from adaplex_adapters.training.events import EventLog, read_events
from adaplex_adapters.training.job_terms import EVENTS

LOCK, CHECKPOINTS = "lock", "checkpoints"


class RunFolder:
    """A run's folder, held by this process. Made by `hold`."""

    def __init__(self, path: Path, log: EventLog) -> None:
        self.path, self.log = path, log
        self.checkpoints = Checkpoints(path / CHECKPOINTS)


@contextmanager
def hold(path: Path, resume: bool, every: int = 1) -> Iterator[RunFolder]:
    """Hold the folder, which is made if needed. Without `resume` what a finished run left in it goes away.

    Raises Conflict while another process holds it, or without `resume` where an unfinished run left checkpoints;
    StorageFailed when the disk refuses.
    """
    with disk_errors("Opening the folder of the run"):
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(f"another process is training in {path.name}", param="out") from error
        if not resume:
            if Checkpoints(path / CHECKPOINTS).steps() and not has_succeeded(path):
                raise Conflict(
                    f"{path.name} holds checkpoints of an unfinished run: go on with --resume, or remove the folder",
                    param="resume",
                )
            Checkpoints(path / CHECKPOINTS).clear()
            (path / EVENTS).unlink(missing_ok=True)
        yield RunFolder(path, EventLog(path, every))
    finally:
        os.close(lock)


def has_succeeded(path: Path) -> bool:
    """Whether the run in a folder came to its end."""
    if not (path / EVENTS).is_file():
        return False
    last = None
    for last in read_events(path):  # noqa: B007 (only the last one counts)
        pass
    return last is not None and last["type"] == "succeeded"
