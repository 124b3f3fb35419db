"""`adaplex adapters`: list, add and remove on a running server, and check a folder without one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from adaplex_adapters.errors import AdaplexError, InvalidRequest, Unavailable

app = typer.Typer(help="List, add, remove and check adapters.", no_args_is_help=True)
Server = Annotated[str, typer.Option(help="Address of the running server.", envvar="ADAPLEX_SERVER")]
DEFAULT_SERVER = "http://127.0.0.1:8000"
FILES = ("adapter_config.json", "adapter_model.safetensors")


def call(server: str, method: str, path: str, **arguments: Any) -> Any:
    """One HTTP call; what the server says of an error is raised with its words."""
    try:
        answer = httpx.request(method, f"{server}{path}", timeout=600, **arguments)
    except httpx.HTTPError as error:
        raise Unavailable(f"no server answers at {server}: {error}; start one with `adaplex serve`") from error
    if answer.is_error:
        try:
            message = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"the server at {server} answered {answer.status_code}"
        raise AdaplexError(message)
    return answer.json()


@app.command("list")
def list_adapters(server: Server = DEFAULT_SERVER) -> None:
    """Show the adapters of a running server."""
    table = Table("name", "kind", "rank", "targets", "MB", "state", "revision")
    for adapter in call(server, "GET", "/v1/adapters")["data"]:
        table.add_row(
            adapter["name"],
            adapter["kind"],
            str(adapter["rank"]),
            " ".join(adapter["targets"]),
            f"{adapter['size_bytes'] / 1e6:.1f}",
            adapter["state"],
            adapter["revision"][:12],
        )
    Console().print(table)


@app.command("add")
def add_adapter(name: str, folder: Path, server: Server = DEFAULT_SERVER) -> None:
    """Upload a PEFT folder and serve it under NAME; an adapter of that name is replaced without dropping a stream."""
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise InvalidRequest(f"{folder} holds no {' and no '.join(missing)}; give the folder that PEFT saved")
    parts = [("files", (file, (folder / file).read_bytes())) for file in FILES]
    added = call(server, "POST", "/v1/adapters", data={"name": name}, files=parts)
    print(f"serving {added['name']} ({added['kind']}, rank {added['rank']}) as revision {added['revision'][:12]}")


@app.command("remove")
def remove_adapter(name: str, server: Server = DEFAULT_SERVER) -> None:
    """Unregister NAME; streams that run finish."""
    call(server, "DELETE", f"/v1/adapters/{name}")
    print(f"removed {name}")
