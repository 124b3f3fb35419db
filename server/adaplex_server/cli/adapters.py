"""`adaplex adapters`: list, add and remove on a running server, and check a folder without one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from adaplex_adapters.errors import InvalidAdapter, InvalidRequest
from adaplex_adapters.peft_fields import CONFIG_FILE
from adaplex_server.cli.remote import DEFAULT_SERVER, Server, call

if TYPE_CHECKING:
    from adaplex_adapters.spec import Adapter, AdapterSpec
    from adaplex_server.model.config import ModelConfig

app = typer.Typer(help="List, add, remove and check adapters.", no_args_is_help=True)


@app.command("list")
def list_adapters(server: Server = DEFAULT_SERVER) -> None:
    """Show the adapters of a running server."""
    table = Table("name", "kind", "size", "targets", "MB", "state", "revision")
    for adapter in call(server, "GET", "/v1/adapters")["data"]:
        table.add_row(
            adapter["name"],
            adapter["kind"],
            str(adapter["rank"] or adapter["virtual_tokens"] or adapter["bottleneck_size"] or ""),
            " ".join(adapter["targets"]),
            f"{adapter['size'] / 1e6:.1f}",
            adapter["state"],
            adapter["revision"][:12],
        )
    Console().print(table)


@app.command("add")
def add_adapter(name: str, folder: Path, server: Server = DEFAULT_SERVER) -> None:
    """Upload a PEFT folder and serve it under NAME; an adapter of that name is replaced without dropping a stream."""
    from adaplex_adapters.folder import KEPT_FILES, TENSOR_FILE  # torch takes a second to import

    there = [file for file in KEPT_FILES if (folder / file).is_file()]
    if CONFIG_FILE not in there or len(there) < 2:
        raise InvalidRequest(f"{folder} holds no {CONFIG_FILE} or no {TENSOR_FILE}; give the folder that PEFT saved")
    parts = [("files", (file, (folder / file).read_bytes())) for file in there]
    added = call(server, "POST", "/v1/adapters", data={"name": name}, files=parts)
    size = f"{added['parameters']:,} parameters"
    print(f"serving {added['name']} ({added['kind']}, {size}) as revision {added['revision'][:12]}")


@app.command("remove")
def remove_adapter(name: str, server: Server = DEFAULT_SERVER) -> None:
    """Unregister NAME; streams that run finish."""
    call(server, "DELETE", f"/v1/adapters/{name}")
    print(f"removed {name}")


@app.command("check")
def check_folder(
    folder: Path,
    base: Annotated[
        str | None, typer.Option(help="The base it is for, as `adaplex serve --base`; the embedded one unless given.")
    ] = None,
) -> None:
    """Tell what an adapter's folder holds, what it would cost on the device, and every problem that would have a server
    refuse it; without a server.
    """
    import torch

    from adaplex_adapters.describe import check_adapter
    from adaplex_server.bases.locate import locate_base
    from adaplex_server.model.adapter_cost import device_bytes
    from adaplex_server.model.config import read_config
    from adaplex_server.model.families import base_shape

    located = locate_base(base)
    config = read_config(located.folder, located.name)
    report = check_adapter(folder, base_shape(config))
    problems = list(report.problems)
    if report.adapter is not None:
        for line in describe_spec(report.adapter.spec, report.modules):
            print(line)
        if not problems:
            cost = device_bytes(report.adapter, config, torch.bfloat16)
            print(f"takes {cost / 1e6:.1f} MB of a GPU in bfloat16, {2 * cost / 1e6:.1f} MB on the CPU, while resident")
            problems += unserved(report.adapter, config)
    for warning in report.warnings:
        print(f"warning: {warning}")
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        raise InvalidRequest(f"{folder} would be refused for {located.name}")
    print(f"fits {located.name}")


def unserved(adapter: Adapter, config: ModelConfig) -> list[str]:
    """Why the decoder cannot serve a good adapter on this base, if it cannot."""
    from adaplex_server.model.adapter_image import RANK_PAGE
    from adaplex_server.model.bottlenecks import refuse_bottlenecks

    try:
        refuse_bottlenecks(adapter, config, RANK_PAGE)
    except InvalidAdapter as error:
        return [error.message]
    return []


def describe_spec(spec: AdapterSpec, modules: int) -> list[str]:
    """What an adapter is, in lines for a person."""
    sizes = [
        f"rank {spec.rank}" if spec.rank else "",
        f"{spec.virtual_tokens} virtual tokens" if spec.virtual_tokens else "",
        f"bottlenecks of {spec.bottleneck_size}" if spec.bottleneck_size else "",
        f"{modules} modules ({' '.join(spec.targets)})" if modules else "",
    ]
    return [
        ", ".join([spec.kind, *filter(None, sizes)]),
        f"{spec.parameters:,} parameters, {spec.nbytes / 1e6:.1f} MB, revision {spec.revision[:12]}",
    ]
