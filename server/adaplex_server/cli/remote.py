"""One HTTP call to a running server, for the commands that talk to one."""

from __future__ import annotations

import os
from typing import Annotated, Any

import httpx
import typer

from adaplex_adapters.errors import AdaplexError, Unavailable
from adaplex_server.settings import KEY_VARIABLE, SERVER_VARIABLE

Server = Annotated[str, typer.Option(help="Address of the running server.", envvar=SERVER_VARIABLE)]
DEFAULT_SERVER = "http://127.0.0.1:8000"


def call(server: str, method: str, path: str, **arguments: Any) -> Any:
    """What the server answers, as JSON. The API key is the environment's. What it says of an error is raised with its
    words.
    """
    try:
        answer = httpx.request(method, f"{server}{path}", timeout=600, headers=key_header(), **arguments)
    except httpx.HTTPError as error:
        raise Unavailable(f"no server answers at {server}: {error}; start one with `adaplex serve`") from error
    if answer.is_error:
        raise AdaplexError(_words(answer, server))
    return answer.json()


def key_header() -> dict[str, str]:
    """The header with the API key, if there is one."""
    key = os.environ.get(KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _words(answer: httpx.Response, server: str) -> str:
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"the server at {server} answered {answer.status_code}"
    hint = f"; set {KEY_VARIABLE}" if answer.status_code == 401 else ""
    return message + hint
