"""A base as it lies in the device's memory, kept on disk, so that a later start neither quantizes nor repacks it.

    <folder>/<key>.json   the description, where each tensor lies, and a checksum (XXH3, 128 bits) of each piece
    <folder>/<key>.bin    the tensors: first those on the device, then those in host memory

The key covers the checkpoint's files (names, sizes, times), how it is loaded, the kind of device, and the source code
of the loader and the kernels: whatever might change the bytes changes the key. A file that is damaged or not understood
is ignored and removed. The least recently used are removed beyond a few. Owns nothing but those files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import xxhash

from adaplex_server.model.base import Base
from adaplex_server.model.base_tensors import NotPlain, put_together, take_apart
from adaplex_server.model.config import ModelConfig
from adaplex_server.model.device_reads import PIECE, DamagedPiece, read_pieces

log = logging.getLogger("adaplex.engine")
_ALIGN = 512
_KEPT = 3
_PARTS = tuple(field.name for field in fields(Base) if field.name != "config")


def weight_key(folder: Path, config: ModelConfig, options: Sequence[object], device: torch.device) -> str:
    """options: whatever else decides how the checkpoint in `folder` is kept. Raises OSError."""
    names = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json") and p.is_file())
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in names]
    machine = torch.cuda.get_device_capability(device) if device.type == "cuda" else device.type
    text = repr((str(folder.resolve()), files, config, tuple(options), machine, torch.__version__))
    return hashlib.sha256(_source() + text.encode()).hexdigest()[:32]


def _source() -> bytes:
    """Digest of all code that decides what the bytes mean."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(p for part in ("model", "kernels") for p in (root / part).rglob("*") if p.is_file()):
        if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h"):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.digest()


class WeightCache:
    """The cached base of one key in `folder`."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder
        self._header = folder / f"{key}.json"
        self._data = folder / f"{key}.bin"

    @torch.no_grad()
    def load(self, config: ModelConfig, device: torch.device) -> Base | None:
        """The base, or None if it is not here, whole."""
        try:
            header = json.loads(self._header.read_bytes())
            if xxhash.xxh3_128_hexdigest(_canonical(header["base"])) != header["sum"]:
                raise DamagedPiece("its header is damaged")
            tensors = self._tensors(header["base"], device)
            values = {name: put_together(header["base"]["parts"][name], tensors) for name in _PARTS}
            os.utime(self._header)
            return Base(config=config, **values)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, NotPlain, DamagedPiece) as error:
            log.warning("the cached weights %s are not used: %s", self._header.stem[:12], error)
            self._remove(self._header.stem)
            return None

    def _tensors(self, kept: dict[str, Any], device: torch.device) -> list[torch.Tensor]:
        """Views of one block of memory on the device and one on the host."""
        sizes, sums = kept["sizes"], kept["sums"]
        blocks = {
            "device": torch.empty(sizes["device"], dtype=torch.uint8, device=device),
            "host": torch.empty(sizes["host"], dtype=torch.uint8),
        }
        split = -(-sizes["device"] // PIECE)
        read_pieces(self._data, 0, blocks["device"], [bytes.fromhex(one) for one in sums[:split]])
        read_pieces(self._data, split * PIECE, blocks["host"], [bytes.fromhex(one) for one in sums[split:]])
        found = []
        for entry in kept["tensors"]:
            raw = blocks[entry["where"]][entry["begin"] : entry["begin"] + entry["bytes"]].view(
                getattr(torch, entry["dtype"])
            )
            if raw.numel() != math.prod(entry["shape"]):
                raise DamagedPiece("a tensor's shape is wrong")
            found.append(raw.as_strided(entry["shape"], entry["strides"]))
        return found

    @torch.no_grad()
    def save(self, base: Base) -> None:
        """Keep the base, if the disk has room for it."""
        made = [path.with_suffix(path.suffix + ".new") for path in (self._data, self._header)]
        try:
            tensors: list[torch.Tensor] = []
            parts = {name: take_apart(getattr(base, name), tensors) for name in _PARTS}
            placed = _place(tensors)
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            room = shutil.disk_usage(self._folder).free
            if room < 2 * sum(placed["sizes"].values()):
                raise NotPlain("the disk has no room for them")
            sums = []
            with made[0].open("wb") as file:
                for where in ("device", "host"):
                    for piece in _pieces(tensors, placed, where):
                        sums.append(xxhash.xxh3_128_hexdigest(piece))
                        file.write(piece)
                        file.write(b"\0" * (-file.tell() % PIECE if where == "device" else 0))
            kept = {**placed, "sums": sums, "parts": parts}
            made[1].write_bytes(_canonical({"base": kept, "sum": xxhash.xxh3_128_hexdigest(_canonical(kept))}))
            for path in made:
                os.rename(path, path.with_suffix(""))
            self._prune()
        except (OSError, NotPlain) as error:
            log.warning("the weights are not cached: %s", error)
            for path in made:
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def _prune(self) -> None:
        """The most recently used stay, and what is half-written goes."""
        by_use = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        keep = {path.stem for path in by_use[:_KEPT]}
        for path in self._folder.iterdir():
            if path.name.split(".")[0] not in keep:
                path.unlink(missing_ok=True)

    def _remove(self, key: str) -> None:
        for path in (self._header, self._data):
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _place(tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Where each tensor lies in the data of the device or of the host. NotPlain for one with holes or overlaps."""
    sizes = {"device": 0, "host": 0}
    entries = []
    for tensor in tensors:
        strides = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
        dense = 1
        for stride, size in strides:
            if stride != dense:
                raise NotPlain("a tensor of theirs is not dense")
            dense *= size
        where = "host" if tensor.device.type == "cpu" and any(t.device.type != "cpu" for t in tensors) else "device"
        nbytes = tensor.numel() * tensor.element_size()
        entries.append(
            {
                "where": where,
                "begin": sizes[where],
                "bytes": nbytes,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "strides": list(tensor.stride()),
            }
        )
        sizes[where] += -(-nbytes // _ALIGN) * _ALIGN
    return {"sizes": sizes, "tensors": entries}


def _pieces(tensors: Sequence[torch.Tensor], placed: dict[str, Any], where: str) -> Iterator[memoryview]:
    """The data of one place in pieces of PIECE bytes, the last one shorter."""
    piece = torch.zeros(PIECE, dtype=torch.uint8)
    at = 0
    for tensor, entry in zip(tensors, placed["tensors"], strict=True):
        if entry["where"] != where:
            continue
        raw = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        begin, done = entry["begin"], 0
        while done < entry["bytes"]:
            if begin + done >= at + PIECE:
                yield memoryview(piece.numpy().data)
                at += PIECE
                continue
            offset = begin + done - at
            count = min(entry["bytes"] - done, PIECE - offset)
            piece[offset : offset + count].copy_(raw[done : done + count])
            done += count
    rest = placed["sizes"][where] - at
    while rest > 0:
        yield memoryview(piece.numpy().data)[: min(rest, PIECE)]
        rest -= PIECE
