"""Writing a checkpoint of safetensors, in shards where it is large: whole under its name, or not there at all.

Layout: model.safetensors, or model-00001-of-00002.safetensors, ... with model.safetensors.index.json, as transformers
reads them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from adaplex_adapters.durable import sync
from adaplex_adapters.errors import Conflict, StorageFailed

SHARD_BYTES = 4 * 2**30


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, renamed to it when the block ends well and removed when it does not.

    Raises Conflict when `out` exists and is not an empty folder, StorageFailed when the disk refuses.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Conflict(f"{out} exists already; choose another --out or remove it", param="out")
    staging: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        yield staging
        staging.chmod(0o755)
        for path in (*staging.iterdir(), staging):
            sync(path)
        staging.rename(out)
        sync(out.parent)
    except OSError as error:
        raise StorageFailed(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


class ShardWriter:
    """Takes tensors one at a time and writes a shard whenever one is full, so that memory holds one shard at most."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._limit = folder, shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[str, ...]] = []
        self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Keep for the present shard; the tensor must not change afterwards."""
        if self._pending and self._pending_bytes + tensor.nbytes > self._limit:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self._total += tensor.nbytes

    def finish(self) -> int:
        """Write what is left and name the files. Returns the bytes of all tensors."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self._folder / "model.safetensors")
            return self._total
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._part(index).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        write_json(
            self._folder / "model.safetensors.index.json",
            {"metadata": {"total_size": self._total}, "weight_map": weight_map},
        )
        return self._total

    def _flush(self) -> None:
        from safetensors.torch import save_file

        part = self._part(len(self._shards))
        save_file(self._pending, part, metadata={"format": "pt"})
        part.chmod(0o644)
        self._shards.append(tuple(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, index: int) -> Path:
        return self._folder / f"part-{index}.safetensors"


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Indented, with a newline at the end."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
