"""`AdapterStore` owns the adapters' bytes on disk: one folder a revision, named by it, written whole or not at all.

    <root>/revisions/<revision>/   a normalized PEFT folder; never edited in place
    <root>/staging/<random>/       uploads, commits and deletions under way; leftovers of a crash are pruned at start

Which names point at which revisions is the catalogue's business. Several threads may use one store; several processes
may read it, and one of them (the holder of the catalogue) writes.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.durable import disk_errors, sync, write_file
from adaplex_adapters.errors import AdaplexError, InvalidAdapter, NotFound, StorageFailed
from adaplex_adapters.limits import ReadLimits
from adaplex_adapters.peft_folder import files_of
from adaplex_adapters.reader import read_adapter, read_unfitted
from adaplex_adapters.spec import Adapter

_log = logging.getLogger(__name__)
_REVISION = re.compile(r"[0-9a-f]{64}")


class AdapterStore:
    """Adapters by revision under `root`, which is created when it is not there (StorageFailed when it cannot be)."""

    def __init__(self, root: Path, limits: ReadLimits = ReadLimits()) -> None:  # noqa: B008 (frozen)
        self._revisions = root / "revisions"
        self._staging = root / "staging"
        self._limits = limits
        self._writing = threading.Lock()
        with disk_errors("Opening the adapter store"):
            for folder in (self._revisions, self._staging):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def commit(self, adapter: Adapter) -> str:
        """Keep the adapter; its revision. When this returns it is on the disk, whole. A second commit changes nothing.

        A stored copy that was damaged meanwhile is replaced. Raises StorageFailed with nothing half-written kept.
        """
        revision = adapter.spec.revision
        target = self._folder(revision)
        with self._writing, disk_errors("Storing the adapter"):
            if target.exists():
                if self._is_whole(revision):
                    sync(self._revisions)  # it may be there by a rename whose caller never got this far
                    return revision
                self._discard(target)
            with self.staging() as staging:
                made = staging / "adapter"
                made.mkdir(mode=0o700)
                for name, pieces in files_of(adapter):
                    write_file(made / name, pieces)
                sync(made)
                os.rename(made, target)
            sync(self._revisions)
        return revision

    def read(self, revision: str, base: BaseShape) -> Adapter:
        """The adapter of this revision, checked against the base, its content verified against the revision.

        Raises NotFound, InvalidAdapter (it does not fit this base) or StorageFailed (its files were changed or
        damaged).
        """
        folder = self._existing(revision)
        try:
            adapter = read_adapter(folder, base, self._limits)
        except InvalidAdapter:
            self._verify(revision)  # tells damage from an adapter that is whole but made for another base
            raise
        if adapter.spec.revision != revision:
            raise _damaged(revision, f"its content is now {adapter.spec.revision[:12]}")
        return adapter

    def folder(self, revision: str) -> Path:
        """The PEFT folder of a revision, to be read only (for merging). NotFound when it is not here."""
        return self._existing(revision)

    def contains(self, revision: str) -> bool:
        """Whether this revision is stored (its content is verified when it is read, not here)."""
        return self._folder(revision).is_dir()

    def revisions(self) -> set[str]:
        """All stored revisions."""
        with disk_errors("Listing the adapter store"):
            return {name for name in os.listdir(self._revisions) if _REVISION.fullmatch(name)}

    def size(self, revision: str) -> int:
        """Bytes that the revision takes on the disk."""
        folder = self._existing(revision)
        with disk_errors("Measuring a stored adapter"), os.scandir(folder) as entries:
            return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)

    def delete(self, revision: str) -> None:
        """Remove a revision; NotFound when it is not here. When this returns it stays gone after a crash."""
        folder = self._existing(revision)
        with self._writing, disk_errors("Deleting a stored adapter"):
            self._discard(folder)
            sync(self._revisions)

    def prune(self, keep: set[str]) -> tuple[str, ...]:
        """At start: empty the staging folder and remove every revision but those of `keep`; what was removed."""
        removed = []
        with self._writing, disk_errors("Cleaning the adapter store"):
            for entry in list(self._staging.iterdir()):
                _remove(entry)
            for name in sorted(os.listdir(self._revisions)):
                if name not in keep:
                    self._discard(self._revisions / name)
                    removed.append(name)
            sync(self._revisions)
        return tuple(removed)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty folder of the caller's own on the store's file system; removed with what is left in it."""
        folder = self._staging / uuid.uuid4().hex
        with disk_errors("Making room for an adapter"):
            folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            _remove(folder)

    def _folder(self, revision: str) -> Path:
        if not _REVISION.fullmatch(revision):
            raise NotFound("A revision is 64 hexadecimal digits.")
        return self._revisions / revision

    def _existing(self, revision: str) -> Path:
        folder = self._folder(revision)
        if not folder.is_dir():
            raise NotFound(f"No adapter of revision {revision[:12]} is stored.")
        return folder

    def _is_whole(self, revision: str) -> bool:
        try:
            self._verify(revision)
        except AdaplexError as error:
            _log.warning("The stored adapter %s is replaced: %s", revision[:12], error.message)
            return False
        return True

    def _verify(self, revision: str) -> None:
        """Raise StorageFailed unless the stored files have the content that the revision names."""
        try:
            found = read_unfitted(self._folder(revision), self._limits).spec.revision
        except InvalidAdapter as error:
            raise _damaged(revision, error.message) from error
        if found != revision:
            raise _damaged(revision, f"its content is now {found[:12]}")

    def _discard(self, folder: Path) -> None:
        """Take a folder out of sight at once (a rename), then remove it."""
        gone = self._staging / uuid.uuid4().hex
        os.rename(folder, gone)
        _remove(gone)


def _damaged(revision: str, what: str) -> StorageFailed:
    return StorageFailed(
        f"The stored adapter {revision[:12]} was changed or damaged on the disk, so it is not served ({what}). "
        "Upload the adapter again, or delete it."
    )


def _remove(path: Path) -> None:
    """Remove a file or tree that nobody can reach any more; what cannot be removed now is pruned at the next start."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("Leftovers in the adapter store could not be removed: %s", error.strerror)
