"""The entry point of `adaplex`: mounts the commands, each of which is a module of its own."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from adaplex_server.cli import adapters, bases, bench, jobs, keys
from adaplex_server.cli.health import health_command
from adaplex_server.cli.merge import merge_command
from adaplex_server.cli.run import run
from adaplex_server.cli.serve import serve
from adaplex_server.cli.train import train_command
from adaplex_server.cli.train_options import TrainCommand

app = typer.Typer(
    name="adaplex",
    help="One frozen, quantized language model in memory; many fine-tuned adapters served from it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"adaplex {version('adaplex')}")
        raise typer.Exit()


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Nothing is done before a command."""


app.command("serve")(serve)
app.command("health")(health_command)
app.command("train", cls=TrainCommand)(train_command)
app.command("merge")(merge_command)
app.add_typer(adapters.app, name="adapters")
app.add_typer(bases.app, name="bases")
app.add_typer(jobs.app, name="jobs")
app.add_typer(keys.app, name="keys")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """The entry point of `adaplex`."""
    run(app)
