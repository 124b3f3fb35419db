"""From what `--base` says to a local folder: the embedded base, a folder, or a model of the Hugging Face hub (from
its cache where it is there).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adaplex_adapters.errors import StartupError
from adaplex_server.bases import embedded

Progress = Callable[[str, float], None]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Nothing pickled is ever fetched, let alone opened.
_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class LocatedBase:
    """folder: in Hugging Face layout, local. name: what the base is called, without a slash."""

    folder: Path
    name: str


def locate_base(arg: str | None, progress: Progress | None = None) -> LocatedBase:
    """arg: None for the embedded base, a folder, or a hub name such as "HuggingFaceTB/SmolLM2-135M-Instruct".

    Raises StartupError that says what was looked for where.
    """
    if arg is None:
        return LocatedBase(embedded.ensure_embedded(progress), embedded.NAME)
    folder = Path(arg).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise StartupError(f"--base {arg}: the folder has no config.json, so it is not in Hugging Face layout")
        return LocatedBase(folder.resolve(), folder.resolve().name)
    if folder.exists() or not _HUB_NAME.fullmatch(arg):
        raise StartupError(
            f"--base {arg}: neither a folder nor a name on the Hugging Face hub (OWNER/NAME); "
            "leave --base out for the embedded base"
        )
    return LocatedBase(_from_hub(arg, progress), arg.rpartition("/")[2])


def _from_hub(name: str, progress: Progress | None) -> Path:
    """The cached snapshot if it is complete (no network is touched), else downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(name, local_files_only=True))
        if _complete(cached):
            return cached
    except LocalEntryNotFoundError:
        pass
    if progress is not None:
        progress(f"downloading {name}", 0.0)
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise StartupError(
            f"--base {name}: there is no such folder, and it could not be fetched from the Hugging Face hub "
            f"({reason}); name a local folder, or leave --base out for the embedded base"
        ) from error


def _complete(folder: Path) -> bool:
    """Whether a download was not broken off: the config is there, and all shards that the index lists."""
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.is_file():
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            return False
    return all((folder / file).is_file() for file in ("config.json", *files))
