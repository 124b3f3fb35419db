"""/v1/files: upload, list, describe, read and delete the files that jobs are trained on or have made."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from adaplex_adapters.durable import disk_errors
from adaplex_adapters.errors import InvalidRequest
from adaplex_server.http_api.body import limited_body
from adaplex_server.http_api.context import context_of
from adaplex_server.http_api.multipart import PartBegin, PartData, split_parts
from adaplex_server.http_api.operation import Operation, json_response
from adaplex_server.http_api.paging import page
from adaplex_server.http_api.schemas.training import File, FileDeleted, FileList
from adaplex_server.http_api.settings import HttpSettings
from adaplex_server.service.service import Service
from adaplex_server.service.training.types import StoredFile

_TEXTS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
_MOST_TEXT = 1000
_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {"type": "string", "contentMediaType": "application/octet-stream"},
                    "purpose": {"type": "string", "enum": ["fine-tune"]},
                },
            }
        }
    },
}


class Files:
    """The files, as resources."""

    def __init__(self, service: Service, settings: HttpSettings) -> None:
        self._service = service
        self._settings = settings

    def operations(self) -> tuple[Operation, ...]:
        """What is served here."""
        many, one = "/v1/files", "/v1/files/{file_id}"
        return (
            Operation(method="GET", path=many, handler=self.list_all, summary="List files", answer=FileList),
            Operation(
                method="POST", path=many, handler=self.upload, summary="Upload a JSONL file to train on", body=_BODY,
                answer=File, errors=(400, 413, 503, 507),
            ),
            Operation(
                method="GET", path=one, handler=self.describe, summary="Describe a file", answer=File, errors=(404,)
            ),
            Operation(
                method="DELETE", path=one, handler=self.delete, summary="Delete a file", answer=FileDeleted,
                errors=(404,),
            ),
            Operation(
                method="GET", path=f"{one}/content", handler=self.content, summary="Read a file",
                answer="application/octet-stream", errors=(404,),
            ),
        )  # fmt: skip

    async def list_all(self, request: Request) -> Response:
        """The newest first; `purpose` chooses."""
        purpose = request.query_params.get("purpose")
        files = self._service.training.files_of(context_of(request.scope).caller)
        files = tuple(one for one in files if purpose in (None, one.purpose))
        shown, more = page(request, files, 10_000)
        first, last = (shown[0].id, shown[-1].id) if shown else (None, None)
        return json_response(FileList([_told(one) for one in shown], more, first, last))

    async def upload(self, request: Request) -> Response:
        """Answered when the file is durable."""
        store = self._service.training.files
        with store.incoming() as path:
            filename, purpose = await self._receive(request, path)
            owner = context_of(request.scope).caller.owner
            return json_response(_told(await asyncio.to_thread(store.take, path, filename, purpose, owner)))

    async def describe(self, request: Request) -> Response:
        """One of them."""
        return json_response(_told(self._file(request)))

    async def delete(self, request: Request) -> Response:
        """Answered when it is gone."""
        file_id = self._file(request).id
        await asyncio.to_thread(self._service.training.files.remove, file_id)
        return json_response(FileDeleted(file_id))

    async def content(self, request: Request) -> Response:
        """Its bytes, never shown by a browser as a page of this server's."""
        file = self._file(request)
        path = self._service.training.files.path(file.id)
        return FileResponse(
            path, media_type="application/octet-stream", filename=file.filename,
            headers={"X-Content-Type-Options": "nosniff"},
        )  # fmt: skip

    def _file(self, request: Request) -> StoredFile:
        """Which the path names, if the caller may see it."""
        return self._service.training.file(request.path_params["file_id"], context_of(request.scope).caller)

    async def _receive(self, request: Request, path: Path) -> tuple[str, str]:
        """The file's bytes into `path`; its name and purpose."""
        limit = self._service.training.max_file_bytes
        chunks = limited_body(request, limit, self._settings.body_idle, "file")
        texts: dict[str, bytes] = {}
        filename, field = None, None
        with disk_errors("Storing the upload"), path.open("wb") as out:
            async for part in split_parts(request.headers.get("content-type", ""), chunks):
                if isinstance(part, PartBegin):
                    field = part.field
                    if part.filename is not None and field == "file" and filename is None:
                        filename = part.filename
                    elif part.filename is not None or field not in _TEXTS or field in texts:
                        raise InvalidRequest(
                            f"unexpected part {field[:60]!a}: send one 'file' and a text 'purpose'", param=field[:60]
                        )
                    else:
                        texts[field] = b""
                elif isinstance(part, PartData) and field == "file":
                    await asyncio.to_thread(out.write, part.data)
                elif isinstance(part, PartData) and field is not None:
                    texts[field] += part.data
                    if len(texts[field]) > _MOST_TEXT:
                        raise InvalidRequest(f"'{field}' is longer than {_MOST_TEXT} bytes", param=field)
        if filename is None or "purpose" not in texts:
            missing = "file" if filename is None else "purpose"
            raise InvalidRequest(f"the part '{missing}' is missing", param=missing)
        return filename, texts["purpose"].decode("utf-8", "replace")


def _told(file: StoredFile) -> File:
    return File(file.id, file.nbytes, int(file.created), file.filename, file.purpose, file.digest)
