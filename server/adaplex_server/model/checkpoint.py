"""The tensors of a model folder in Hugging Face layout, one at a time: model.safetensors, or shards listed in
model.safetensors.index.json.

Files stay mapped, not read: what was not asked for costs no memory. Owns nothing but the open files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from adaplex_adapters.errors import StartupError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class Checkpoint:
    """A context manager. `read` hands out each tensor on the CPU; `unread` tells what nobody asked for.

    prefix: of names in models with a head ("transformer."). The files of a bare model have none of it; their names are
    then told, and asked for, with it.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self._folder = folder
        self._prefix = prefix
        self._files = ExitStack()
        self._of_name: dict[str, Any] = {}
        self._added = ""
        self._read: set[str] = set()

    def __enter__(self) -> Checkpoint:
        with ExitStack() as undo:
            undo.push(self._files)
            for file in self._file_names():
                opened = self._open(self._folder / file)
                self._of_name.update(dict.fromkeys(opened.keys(), opened))
            if self._of_name and not any(name.startswith(self._prefix) for name in self._of_name):
                self._added = self._prefix
                self._of_name = {self._added + name: opened for name, opened in self._of_name.items()}
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._of_name.clear()
        self._files.close()

    def __contains__(self, name: object) -> bool:
        return name in self._of_name

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """The tensor as the file has it. Raises StartupError if it is missing or not of `shape`."""
        opened = self._of_name.get(name)
        if opened is None:
            raise StartupError(f"the checkpoint has no tensor {name}: its files do not fit its config.json")
        found: torch.Tensor = opened.get_tensor(name.removeprefix(self._added))
        if shape is not None and tuple(found.shape) != shape:
            raise StartupError(
                f"the checkpoint's {name} is {list(found.shape)}, but config.json makes it {list(shape)}"
            )
        self._read.add(name)
        return found

    def read_if_there(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """`read`, or None where there is no such tensor."""
        return self.read(name, shape) if name in self else None

    def names_below(self, prefix: str) -> tuple[str, ...]:
        """Every tensor whose name starts with `prefix`."""
        return tuple(name for name in self._of_name if name.startswith(prefix))

    def unread(self) -> tuple[str, ...]:
        """Names that were never read."""
        return tuple(sorted(self._of_name.keys() - self._read))

    def _file_names(self) -> tuple[str, ...]:
        if (self._folder / _SINGLE).is_file():
            return (_SINGLE,)
        if not (self._folder / _INDEX).is_file():
            raise StartupError(f"{self._folder} holds neither {_SINGLE} nor {_INDEX} (pickled weights are not read)")
        try:
            shards: Mapping[str, str] = json.loads((self._folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            names = tuple(sorted(set(shards.values())))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise StartupError(f"cannot read {self._folder / _INDEX}: {error!r}") from error
        for name in names:
            if Path(name).name != name or not (self._folder / name).is_file():
                raise StartupError(f"{_INDEX} lists the shard {name!r}, which is not in {self._folder}")
        return names

    def _open(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return self._files.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise StartupError(f"cannot read {path}: {error}") from error
