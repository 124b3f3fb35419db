"""Reading safetensors folders: single file, shards, and what is wrong with a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adaplex_adapters.errors import StartupError
from adaplex_server.model.checkpoint import Checkpoint

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(4, dtype=torch.bfloat16)}


def _sharded(folder: Path) -> None:
    shards = {}
    for index, (name, tensor) in enumerate(TENSORS.items()):
        save_file({name: tensor}, folder / f"model-{index}.safetensors")
        shards[name] = f"model-{index}.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_come_as_they_were_saved(tmp_path: Path, sharded: bool) -> None:
    if sharded:
        _sharded(tmp_path)
    else:
        save_file(TENSORS, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.unread() == ("a.weight", "b.weight")
        assert torch.equal(checkpoint.read("a.weight", (2, 3)), TENSORS["a.weight"])
        assert checkpoint.unread() == ("b.weight",)
        assert checkpoint.read("b.weight").dtype == torch.bfloat16
        assert checkpoint.read_if_there("c.weight", (1,)) is None


def test_a_missing_tensor_and_a_wrong_shape_are_named(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        with pytest.raises(StartupError, match=r"c\.weight"):
            checkpoint.read("c.weight")
        with pytest.raises(StartupError, match=r"a\.weight is \[2, 3\].*\[3, 2\]"):
            checkpoint.read("a.weight", (3, 2))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither"),
        ({"model.safetensors": b"\xff" * 100}, "cannot read"),
        ({"model.safetensors": b""}, "cannot read"),
        ({"model.safetensors.index.json": b"{"}, "cannot read"),
        ({"model.safetensors.index.json": b"[]"}, "cannot read"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}'}, "lists the shard"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "gone.safetensors"}}'}, "lists the shard"),
    ],
)
def test_a_broken_folder_is_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(StartupError, match=message), Checkpoint(tmp_path):
        pass
