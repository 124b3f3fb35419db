"""The command line `adaplex`. Each command is a module of its own; this only mounts them."""

from adaplex_server.cli.main import main

__all__ = ["main"]
