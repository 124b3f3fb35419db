"""Receives an adapter's files into a staging folder, within limits, for whichever protocol brings them.

Names from the client are never paths: a file name is checked and used as a plain name inside the folder. What the files
hold is the reader's business, what an archive may hold is `adaplex_adapters.uploads`'.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import BinaryIO

from adaplex_adapters.durable import disk_errors
from adaplex_adapters.errors import InvalidAdapter, InvalidRequest, RequestTooLarge
from adaplex_adapters.uploads import UploadLimits, unpack_archive

MAX_FILES = 64
WRITE_BYTES = 1 << 20
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
_STORING = "Storing the upload"


class StagedFiles:
    """Owns the folder `staging`/adapter, the one open file in it, and the count of bytes received.

    max_bytes: of all files together, also unpacked. Every method that writes raises StorageFailed when the disk fails.
    """

    def __init__(self, staging: Path, max_bytes: int) -> None:
        self._staging = staging
        self._folder = staging / "adapter"
        self._max_bytes = max_bytes
        self._received = 0
        self._files: dict[str, Path] = {}
        self._out: BinaryIO | None = None
        self._pending = bytearray()
        with disk_errors(_STORING):
            self._folder.mkdir()

    def begin(self, filename: str) -> None:
        """The next file. Raises InvalidAdapter (name impossible or there already), RequestTooLarge (too many)."""
        assert self._out is None, "the last file was not ended"
        if not _FILE_NAME.fullmatch(filename):
            raise InvalidAdapter(
                f"{filename[:100]!a} cannot be a file of an adapter: its folder holds plain names of letters, "
                "digits, '.', '_' and '-'.",
                param="files",
            )
        # Also where a file system tells case apart: the adapter might be copied to one that does not.
        if filename.lower() in self._files:
            raise InvalidAdapter(f"The file '{filename}' is there twice.", param="files")
        if len(self._files) == MAX_FILES:
            raise RequestTooLarge(f"An upload has at most {MAX_FILES} files.", param="files")
        path = self._folder / filename
        self._files[filename.lower()] = path
        with disk_errors(_STORING):
            self._out = path.open("xb")

    async def write(self, data: bytes) -> None:
        """More bytes of the present file. Raises RequestTooLarge."""
        assert self._out is not None, "no file was begun"
        self._received += len(data)
        if self._received > self._max_bytes:
            raise RequestTooLarge(
                f"The upload is larger than {self._max_bytes} bytes, which is the most this server takes.",
                param="files",
            )
        self._pending += data
        if len(self._pending) >= WRITE_BYTES:
            await self._flush()

    async def end(self) -> None:
        """The present file is complete (nothing happens when none is open)."""
        if self._out is not None:
            await self._flush()
            with disk_errors(_STORING):
                self.close()

    async def complete(self) -> Path:
        """All files are here: the folder to read the adapter from, unpacked first if one archive came.

        Raises InvalidRequest (no files), and what `unpack_archive` raises.
        """
        await self.end()
        if not self._files:
            raise InvalidRequest(
                "There are no files: send those of a PEFT folder, or one archive of it.", param="files"
            )
        first = next(iter(self._files.values()))
        if len(self._files) > 1 or not first.name.lower().endswith(_ARCHIVES):
            return self._folder
        unpacked = self._staging / "unpacked"
        await asyncio.to_thread(unpack_archive, first, unpacked, UploadLimits(max_bytes=self._max_bytes))
        return unpacked

    def close(self) -> None:
        """Close the file that is being written, if any."""
        if self._out is not None:
            self._out.close()
            self._out = None

    async def _flush(self) -> None:
        assert self._out is not None
        pending, self._pending = self._pending, bytearray()
        with disk_errors(_STORING):
            await asyncio.to_thread(self._out.write, pending)
