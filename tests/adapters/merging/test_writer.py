from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from adaplex_adapters.errors import Conflict, StorageFailed
from adaplex_adapters.merging.writer import ShardWriter, whole_folder


def test_a_small_checkpoint_is_one_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    writer = ShardWriter(tmp_path)
    writer.add("a", torch.arange(4.0))
    assert writer.finish() == 16
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.arange(4.0))


def test_shards_are_cut_at_the_limit_and_indexed(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    writer = ShardWriter(tmp_path, shard_bytes=40)
    tensors = {name: torch.full((size,), float(size)) for name, size in (("a", 5), ("b", 5), ("c", 1), ("d", 30))}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    assert writer.finish() == 41 * 4
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 164}
    assert [index["weight_map"][n][6:11] for n in "abcd"] == ["00001", "00001", "00002", "00003"]
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "result"
    with pytest.raises(ValueError), whole_folder(out) as staging:
        (staging / "half").touch()
        assert not out.exists()
        raise ValueError
    with pytest.raises(StorageFailed, match="No space"), whole_folder(out):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(Conflict, match="exists already"), whole_folder(tmp_path / name):
            pass
    with whole_folder(tmp_path / "empty") as staging:
        (staging / "x").touch()
    assert (tmp_path / "empty" / "x").exists() and (tmp_path / "full" / "mine").exists()
