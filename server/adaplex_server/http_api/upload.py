"""Receives the files of one adapter into a staging folder while they arrive, within limits.

Names from the client are never paths: a file name is checked and used as a plain name inside the folder. What the
files hold is the reader's business, what an archive may hold is `adaplex_adapters.uploads`'.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from starlette.requests import Request

from adaplex_adapters.durable import disk_errors
from adaplex_adapters.errors import InvalidAdapter, InvalidRequest, RequestTooLarge
from adaplex_adapters.uploads import UploadLimits, unpack_archive
from adaplex_server.http_api.body import body_chunks
from adaplex_server.http_api.multipart import PartBegin, PartData, PartEvent, split_parts
from adaplex_server.http_api.settings import HttpSettings

MAX_FILES = 64
MAX_NAME_BYTES = 1000
WRITE_BYTES = 1 << 20
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Received:
    """A complete upload: the wished name, not checked yet, and the folder with the adapter's files."""

    name: str
    folder: Path


async def receive_upload(request: Request, staging: Path, settings: HttpSettings) -> Received:
    """Everything that the client sends. Raises InvalidRequest and its kinds, StorageFailed, Cancelled."""
    limit = settings.max_upload_bytes
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise RequestTooLarge(f"The upload is larger than {limit} bytes, which is the most this server takes.")
    folder = staging / "adapter"
    upload = _Upload(folder)
    chunks = _limited(body_chunks(request.receive, settings.body_idle), limit)
    with disk_errors("Storing the upload"), closing(upload):
        folder.mkdir()
        async for part in split_parts(request.headers.get("content-type", ""), chunks):
            await upload.take(part)
        archive = upload.finish()
    if archive is not None:
        folder = staging / "unpacked"
        await asyncio.to_thread(unpack_archive, archive, folder, UploadLimits(max_bytes=limit))
    return Received(upload.name, folder)


async def _limited(chunks: AsyncIterator[bytes], limit: int) -> AsyncIterator[bytes]:
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise RequestTooLarge(f"The upload is larger than {limit} bytes, which is the most this server takes.")
        yield chunk


class _Upload:
    """Owns the open file and the list of files of one upload."""

    def __init__(self, folder: Path) -> None:
        self.name = ""
        self._folder = folder
        self._files: dict[str, Path] = {}
        self._out: BinaryIO | None = None
        self._pending = bytearray()
        self._named = False
        self._name = bytearray()

    async def take(self, part: PartEvent) -> None:
        """The next piece of the body."""
        if isinstance(part, PartBegin):
            self._begin(part)
        elif isinstance(part, PartData):
            await self._data(part.data)
        else:
            await self._end()

    def _begin(self, part: PartBegin) -> None:
        if part.field == "name" and part.filename is None:
            if self._named:
                raise InvalidRequest("'name' is there twice; send it once.", param="name")
            self._named = True
        elif part.field == "files" and part.filename is not None:
            self._open(part.filename)
        else:
            kind = "a text" if part.filename is None else "a file"
            raise InvalidRequest(
                f"Unknown part '{part.field[:100]}' ({kind}): send a text 'name' and files as 'files'.",
                param=part.field[:100],
            )

    def _open(self, filename: str) -> None:
        if not _FILE_NAME.fullmatch(filename):
            raise InvalidAdapter(
                f"{filename[:100]!a} cannot be a file of an adapter: its folder holds plain names of letters, "
                "digits, '.', '_' and '-'.",
                param="files",
            )
        if filename.lower() in self._files:  # also where a file system tells case apart: the archive might go elsewhere
            raise InvalidAdapter(f"The file '{filename}' is there twice.", param="files")
        if len(self._files) == MAX_FILES:
            raise RequestTooLarge(f"An upload has at most {MAX_FILES} files.", param="files")
        path = self._folder / filename
        self._files[filename.lower()] = path
        self._out = path.open("xb")

    async def _data(self, data: bytes) -> None:
        if self._out is None:
            self._name += data
            if len(self._name) > MAX_NAME_BYTES:
                raise InvalidRequest(f"'name' is longer than {MAX_NAME_BYTES} bytes.", param="name")
            return
        self._pending += data
        if len(self._pending) >= WRITE_BYTES:
            await self._flush()

    async def _flush(self) -> None:
        assert self._out is not None
        pending, self._pending = self._pending, bytearray()
        await asyncio.to_thread(self._out.write, pending)

    async def _end(self) -> None:
        if self._out is not None:
            await self._flush()
            self.close()

    def finish(self) -> Path | None:
        """The body is complete. Returns the archive, if the upload is one."""
        if not self._named:
            raise InvalidRequest("The text field 'name' is missing.", param="name")
        if not self._files:
            raise InvalidRequest(
                "There is no part 'files': send the files of a PEFT folder or an archive.", param="files"
            )
        try:
            self.name = self._name.decode()
        except UnicodeDecodeError:
            raise InvalidRequest("'name' is not UTF-8.", param="name") from None
        first = next(iter(self._files.values()))
        return first if len(self._files) == 1 and first.name.lower().endswith(_ARCHIVES) else None

    def close(self) -> None:
        """Close the file that is being written, if any."""
        if self._out is not None:
            self._out.close()
            self._out = None
