"""`FileStore` owns the bytes of uploaded and made files, one file each under its id; their rows are the `JobStore`'s.

A file is whole and synced before its row is written, and a row goes before its bytes do, so that a crash leaves at
most bytes without a row, which the next start removes.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adaplex_adapters.durable import disk_errors, sync
from adaplex_adapters.errors import InvalidRequest
from adaplex_server.service.training.job_store import JobStore
from adaplex_server.service.training.types import StoredFile

PURPOSES = ("fine-tune", "fine-tune-results")
_CHUNK = 1 << 20


class FileStore:
    """Files in the folder `root`. Calls block; any thread may make them."""

    def __init__(self, root: Path, rows: JobStore) -> None:
        self._root = root
        self._rows = rows
        with disk_errors("Opening the folder of files"):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            known = {file.id for file in rows.files()}
            for found in root.iterdir():
                if found.name not in known:
                    found.unlink()

    @contextmanager
    def incoming(self) -> Iterator[Path]:
        """A name on the same disk for bytes that arrive, gone at the end of the `with` if nobody took the file."""
        path = self._root / f".incoming-{secrets.token_hex(8)}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def take(self, source: Path, filename: str, purpose: str, owner: str | None = None) -> StoredFile:
        """Keep a file that lies on the same disk (it is moved). Raises InvalidRequest for an unknown purpose."""
        if purpose not in PURPOSES:
            raise InvalidRequest(f"purpose is {purpose[:60]!a}; known are {', '.join(PURPOSES)}", param="purpose")
        file_id = f"file-{secrets.token_hex(12)}"
        with disk_errors("Keeping the file"):
            digest, nbytes = _digest(source)
            os.chmod(source, 0o600)
            sync(source)
            os.rename(source, self._root / file_id)
            sync(self._root)
        stored = StoredFile(file_id, Path(filename).name[:255] or "file", purpose, nbytes, digest, time.time(), owner)
        self._rows.add_file(stored)
        return stored

    def path(self, file_id: str) -> Path:
        """Where the bytes are. Raises NotFound."""
        return self._root / self._rows.file(file_id).id

    def remove(self, file_id: str) -> None:
        """Raises NotFound."""
        path = self.path(file_id)
        self._rows.remove_file(file_id)
        with disk_errors("Deleting the file"):
            path.unlink(missing_ok=True)


def _digest(path: Path) -> tuple[str, int]:
    found, nbytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
            nbytes += len(chunk)
    return found.hexdigest(), nbytes
