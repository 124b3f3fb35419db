"""`adaplex keys`: make, list and revoke API keys, beside a running server or before one starts."""

from __future__ import annotations

import re
import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.table import Table

from adaplex_adapters.errors import InvalidRequest
from adaplex_server.caller import VERBS, Caller, Limits, Verb
from adaplex_server.cli.parts import key_file
from adaplex_server.service.access.key_store import KeyStore
from adaplex_server.service.access.keys import KeyRecord
from adaplex_server.settings import default_data_dir

app = typer.Typer(
    help="API keys. A server without keys answers anybody; once there is one, nobody without a key.",
    no_args_is_help=True,
)
DataDir = Annotated[
    Path | None, typer.Option(help="The server's data folder, as `adaplex serve`.", envvar="ADAPLEX_DATA_DIR")
]
_UNITS = {"m": 60, "h": 3600, "d": 86400}


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, for lists and logs.")],
    verbs: Annotated[str, typer.Option(help="What it may do, of generate, observe, adapters, train.")] = "generate",
    models: Annotated[str, typer.Option(help="Names or patterns it may ask for: 'team-a-*,itn-en'.")] = "*",
    requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Prompts and answers together.")] = None,
    streams: Annotated[int | None, typer.Option(min=1, help="Requests under way at once.")] = None,
    expires: Annotated[str | None, typer.Option(help="After how long it ends: 30d, 12h, 15m.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Make a key and print it, once: only its hash is kept. A running server knows it within a second."""
    limits = Limits(requests_per_minute, tokens_per_minute, streams)
    caller = Caller(None, name, _verbs(verbs), tuple(_words(models)), limits)
    with closing(KeyStore(key_file(data_dir or default_data_dir()))) as store:
        print(store.create(caller, _end(expires)))


@app.command("list")
def list_keys(data_dir: DataDir = None) -> None:
    """Show all keys with their scope and limits; secrets are not kept and cannot be shown."""
    table = Table("id", "name", "may", "models", "a minute", "streams", "state")
    with closing(KeyStore(key_file(data_dir or default_data_dir()))) as store:
        for public, record in store.records().items():
            caller, limits = record.caller, record.caller.limits
            rates = [f"{limits.requests} requests"] * bool(limits.requests)
            rates += [f"{limits.tokens} tokens"] * bool(limits.tokens)
            table.add_row(
                public, caller.name, " ".join(sorted(caller.verbs)), " ".join(caller.models), ", ".join(rates) or "-",
                str(limits.streams or "-"), _state(record),
            )  # fmt: skip
    Console().print(table)


@app.command("revoke")
def revoke(key_id: str, data_dir: DataDir = None) -> None:
    """End a key; running servers refuse it within a second, streams that run finish."""
    with closing(KeyStore(key_file(data_dir or default_data_dir()))) as store:
        store.revoke(key_id)
    print(f"revoked {key_id}")


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[,\s]+", text) if word]


def _verbs(text: str) -> frozenset[Verb]:
    found = frozenset(_words(text))
    if not found or not found <= VERBS:
        raise InvalidRequest(f"--verbs is {text!r}; give some of {', '.join(sorted(VERBS))}", param="verbs")
    return cast("frozenset[Verb]", found)


def _end(text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,6})([mhd])", text)
    if found is None:
        raise InvalidRequest(f"--expires is {text!r}; write it as 15m, 12h or 30d", param="expires")
    return time.time() + int(found[1]) * _UNITS[found[2]]


def _state(record: KeyRecord) -> str:
    if record.revoked:
        return "revoked"
    if record.expires is None:
        return "good"
    until = datetime.fromtimestamp(record.expires, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"until {until}" if record.usable(time.time()) else f"expired {until}"
