"""Serves the console's page, style sheet and modules from memory. They are public; what they show needs the API."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from adaplex_adapters.errors import NotFound
from adaplex_server.http_api.operation import Operation

FOLDER = Path(__file__).parent
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # A browser keeps it and asks each time whether it is still so.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Asset:
    """One file. tag: a strong ETag, from its content."""

    body: bytes
    media_type: str
    tag: str


def _read(path: Path) -> Asset:
    body = path.read_bytes()
    return Asset(body, TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')


class Console:
    """Owns the files, read once."""

    def __init__(self) -> None:
        self._assets = {path.name: _read(path) for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}

    def operations(self) -> tuple[Operation, ...]:
        """What is served here."""
        get = "GET"
        return (
            Operation(method=get, path="/", handler=self.page, summary="The console", answer="text/html"),
            Operation(
                method=get, path="/console/{asset}", handler=self.asset, summary="A file of the console",
                answer="text/plain", errors=(404,),
            ),
        )  # fmt: skip

    async def page(self, request: Request) -> Response:
        """The page itself."""
        return self._answer(request, self._assets["index.html"])

    async def asset(self, request: Request) -> Response:
        """What the page asks for."""
        found = self._assets.get(request.path_params["asset"])
        if found is None:
            raise NotFound("The console has no such file.")
        return self._answer(request, found)

    def _answer(self, request: Request, asset: Asset) -> Response:
        headers = {**HEADERS, "ETag": asset.tag}
        if asset.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(asset.body, headers={**headers, "Content-Type": asset.media_type})
