"""Mounts the commands and turns an error of the tree into one line on standard error and an exit code."""

from __future__ import annotations

import sys

import typer

from adaplex_adapters.errors import AdaplexError, StartupError
from adaplex_server.cli import adapters, bench
from adaplex_server.cli.merge import merge_command
from adaplex_server.cli.serve import serve
from adaplex_server.cli.train import train_command

app = typer.Typer(
    name="adaplex",
    help="One frozen, quantized language model in memory; many fine-tuned adapters served from it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("serve")(serve)
app.command("train")(train_command)
app.command("merge")(merge_command)
app.add_typer(adapters.app, name="adapters")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """The entry point of `adaplex`."""
    run(app)


def run(application: typer.Typer) -> None:
    """Run a command line; an AdaplexError ends it with its message and a code that is not 0."""
    try:
        application()
    except AdaplexError as error:
        print(f"adaplex: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, StartupError) else 1)
