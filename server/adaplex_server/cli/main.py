"""The entry point of `adaplex`: mounts the commands, each of which is a module of its own."""

from __future__ import annotations

import typer

from adaplex_server.cli import adapters, bases, bench, jobs, keys
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
app.command("serve")(serve)
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
