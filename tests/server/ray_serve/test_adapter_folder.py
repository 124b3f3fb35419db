from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from adaplex_server.ray_serve.adapter_folder import AdapterFolder
from adaplex_server.service.registry import Registry


class Loads:
    """Stands for the registry: remembers what it was told to load."""

    def __init__(self) -> None:
        self.names: list[str] = []

    async def load_folders(self, folders: Mapping[str, Path]) -> None:
        self.names += folders


def write(folder: Path, text: str = "{}", time: int = 1) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(text)
    os.utime(folder / "adapter_config.json", (time, time))


async def test_only_what_is_new_is_loaded(tmp_path: Path) -> None:
    write(tmp_path / "old")
    loads: Any = Loads()
    folder = AdapterFolder(tmp_path, cast(Registry, loads))
    for name in ("old", "new", "new"):
        await folder.refresh(name)
    assert loads.names == []
    write(tmp_path / "new")
    write(tmp_path / "old", time=2)
    for name in ("old", "new", "old", "new"):
        await folder.refresh(name)
    assert loads.names == ["old", "new"]


async def test_no_name_leads_out_of_the_folder(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    loads: Any = Loads()
    folder = AdapterFolder(inside, cast(Registry, loads))
    write(tmp_path / "outside")
    (inside / "deep").mkdir()
    write(inside / "deep" / "er")
    for name in ("../outside", "..", ".", "", "deep/er", str(tmp_path / "outside"), "a\0b"):
        await folder.refresh(name)
    assert loads.names == []


async def test_without_a_folder_nothing_is_looked_for(tmp_path: Path) -> None:
    await AdapterFolder(None, cast(Registry, Loads())).refresh("one")
