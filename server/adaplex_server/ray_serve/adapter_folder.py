"""`AdapterFolder` owns what a replica knows of the shared adapter folder: which content it has taken up."""

from __future__ import annotations

import asyncio
from pathlib import Path

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.names import check_name
from adaplex_server.service.registry import Registry

Stamp = tuple[tuple[str, int, int], ...]


class AdapterFolder:
    """Keeps a registry in step with the folder, name by name, when a name is asked for.

    folder: None for none. Made before the service starts, which itself takes up what is there then.
    """

    def __init__(self, folder: Path | None, registry: Registry) -> None:
        self._folder = folder
        self._registry = registry
        present = [] if folder is None else sorted(folder.iterdir())
        self._seen = {path.name: _stamp(path) for path in present if path.is_dir()}

    async def refresh(self, name: str) -> None:
        """Serve the folder's present content under this name, if there is any and it was not taken up yet.

        What is wrong with a folder is logged, and told by the registry to whoever asks for the name; a bad replacement
        leaves the earlier content in service.
        """
        if self._folder is None or not _is_folder_name(name):
            return
        path = self._folder / name
        stamp = await asyncio.to_thread(_stamp, path)
        if stamp and stamp != self._seen.get(name):
            self._seen[name] = stamp
            await self._registry.load_folders({name: path})


def _stamp(path: Path) -> Stamp:
    """Name, size and time of each file; empty if there is no such folder."""
    try:
        files = [(one.name, one.stat()) for one in sorted(path.iterdir()) if one.is_file()]
    except OSError:
        return ()
    return tuple((name, found.st_size, found.st_mtime_ns) for name, found in files)


def _is_folder_name(name: str) -> bool:
    try:
        check_name(name)
    except InvalidRequest:
        return False
    return "/" not in name
