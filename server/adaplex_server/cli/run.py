"""Runs a command line and turns an error of the tree into one line on standard error and an exit code."""

from __future__ import annotations

import sys

import typer

from adaplex_adapters.errors import AdaplexError, StartupError


def run(application: typer.Typer) -> None:
    """Run a command line; an AdaplexError ends it with its message and a code that is not 0."""
    try:
        application()
    except AdaplexError as error:
        print(f"adaplex: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, StartupError) else 1)
