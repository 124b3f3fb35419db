"""Receives the multipart upload of one adapter: its name, and its files into a staging folder while they arrive.

What a file may be called and how large files may be is `StagedFiles`'s rule, which gRPC's uploads share.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request

from adaplex_adapters.errors import InvalidRequest
from adaplex_server.http_api.body import limited_body
from adaplex_server.http_api.multipart import PartBegin, PartData, PartEvent, split_parts
from adaplex_server.http_api.settings import HttpSettings
from adaplex_server.service.staged_files import StagedFiles

MAX_NAME_BYTES = 1000


@dataclass(frozen=True)
class Received:
    """A complete upload: the wished name, not checked yet, and the folder with the adapter's files."""

    name: str
    folder: Path


async def receive_upload(request: Request, staging: Path, settings: HttpSettings) -> Received:
    """Everything that the client sends. Raises InvalidRequest and its kinds, StorageFailed, Cancelled."""
    limit = settings.max_upload_bytes
    # The files' own sizes do not count what lies between the parts.
    chunks = limited_body(request, limit, settings.body_idle, "upload")
    with closing(StagedFiles(staging, limit)) as files:
        upload = _Upload(files)
        async for part in split_parts(request.headers.get("content-type", ""), chunks):
            await upload.take(part)
        return Received(upload.name(), await files.complete())


class _Upload:
    """Tells the parts of one upload apart; owns the name as far as it has come."""

    def __init__(self, files: StagedFiles) -> None:
        self._files = files
        self._in_file = False
        self._name: bytearray | None = None

    async def take(self, part: PartEvent) -> None:
        """The next piece of the body."""
        if isinstance(part, PartBegin):
            self._begin(part)
        elif not isinstance(part, PartData):
            await self._files.end()
        elif self._in_file:
            await self._files.write(part.data)
        else:
            self._add_to_name(part.data)

    def name(self) -> str:
        """The name, when the body is complete."""
        if self._name is None:
            raise InvalidRequest("The text field 'name' is missing.", param="name")
        try:
            return self._name.decode()
        except UnicodeDecodeError:
            raise InvalidRequest("'name' is not UTF-8.", param="name") from None

    def _begin(self, part: PartBegin) -> None:
        self._in_file = part.filename is not None
        if part.field == "name" and part.filename is None:
            if self._name is not None:
                raise InvalidRequest("'name' is there twice; send it once.", param="name")
            self._name = bytearray()
        elif part.field == "files" and part.filename is not None:
            self._files.begin(part.filename)
        else:
            kind = "a text" if part.filename is None else "a file"
            raise InvalidRequest(
                f"Unknown part '{part.field[:100]}' ({kind}): send a text 'name' and files as 'files'.",
                param=part.field[:100],
            )

    def _add_to_name(self, data: bytes) -> None:
        assert self._name is not None, "a text part that is not the name was let through"
        self._name += data
        if len(self._name) > MAX_NAME_BYTES:
            raise InvalidRequest(f"'name' is longer than {MAX_NAME_BYTES} bytes.", param="name")
