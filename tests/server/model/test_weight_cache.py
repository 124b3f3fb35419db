"""A base kept on disk comes back bit for bit, or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adaplex_loadtest.shapes import shape_config
from adaplex_server.model import device_reads, weight_cache
from adaplex_server.model.base import Base
from adaplex_server.model.base_tensors import NotPlain, put_together, take_apart
from adaplex_server.model.random_base import random_base
from adaplex_server.model.weight_cache import WeightCache, weight_key

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (device_reads, weight_cache):
        monkeypatch.setattr(module, "PIECE", 4096)


def tensors_of(base: Base) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    take_apart((base.embedding, base.layers, base.final_norm, base.head), found)
    return found


def equal(one: Base, other: Base) -> bool:
    pairs = list(zip(tensors_of(one), tensors_of(other), strict=True))
    return one.format == other.format and all(
        a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b) for a, b in pairs
    )


def base_of(form: str, dtype: torch.dtype = torch.float32) -> Base:
    return random_base(shape_config("tiny"), form, dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["none", "nf4", "gptq"])
def test_it_comes_back(tmp_path: Path, form: str) -> None:
    base = base_of(form)
    cache = WeightCache(tmp_path / "weights", "a" * 32)
    assert cache.load(base.config, CPU) is None
    cache.save(base)
    found = cache.load(base.config, CPU)
    assert found is not None and equal(base, found)
    assert (found.head is found.embedding) == (base.head is base.embedding)
    x = torch.randn(3, base.config.hidden_size)
    assert torch.equal(base.layers[1].linears["qkv"](x), found.layers[1].linears["qkv"](x))
    assert sorted(path.suffix for path in (tmp_path / "weights").iterdir()) == [".bin", ".json"]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit(path: Path, change: Callable[[dict], object]) -> None:
    header = json.loads(path.read_bytes())
    change(header["base"])
    header["sum"] = weight_cache.xxhash.xxh3_128_hexdigest(weight_cache._canonical(header["base"]))
    path.write_bytes(json.dumps(header).encode())


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "data": lambda header, data: flip(data, 5000),
    "a later piece": lambda header, data: flip(data, 100_000),
    "truncated": lambda header, data: os.truncate(data, 9000),
    "data gone": lambda header, data: data.unlink(),
    "header": lambda header, data: flip(header, 40),
    "no JSON": lambda header, data: header.write_bytes(b"\xff"),
    "empty": lambda header, data: header.write_bytes(b""),
    "another class": lambda header, data: edit(header, lambda b: b["parts"]["final_norm"].update({"class": "os:x"})),
    "no class": lambda header, data: edit(
        header, lambda b: b["parts"]["final_norm"].update({"class": "adaplex_server.model.base:load_base"})
    ),
    "a field more": lambda header, data: edit(header, lambda b: b["parts"]["final_norm"]["fields"].update(more=1)),
    "fewer sums": lambda header, data: edit(header, lambda b: b["sums"].pop()),
    "larger": lambda header, data: edit(header, lambda b: b["tensors"][0].update(shape=[1 << 20, 1 << 20])),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_removed(tmp_path: Path, damage: str) -> None:
    base = base_of("nf4")
    cache = WeightCache(tmp_path, "a" * 32)
    cache.save(base)
    DAMAGES[damage](tmp_path / f"{'a' * 32}.json", tmp_path / f"{'a' * 32}.bin")
    assert cache.load(base.config, CPU) is None
    cache.save(base)
    found = cache.load(base.config, CPU)
    assert found is not None and equal(base, found)


def test_only_the_last_used_stay(tmp_path: Path) -> None:
    base = base_of("none")
    for number, key in enumerate("abcd"):
        WeightCache(tmp_path, key).save(base)
        os.utime(tmp_path / f"{key}.json", (number, number))
    (tmp_path / "e.bin.new").write_text("half")
    WeightCache(tmp_path, "f").save(base)
    assert {path.name for path in tmp_path.iterdir()} == {f"{k}.{s}" for k in "cdf" for s in ("json", "bin")}


def test_a_disk_without_room_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("a file")
    WeightCache(tmp_path / "weights", "a").save(base_of("none"))


def test_the_key_knows_what_matters(tmp_path: Path) -> None:
    config = shape_config("tiny")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"1")
    first = weight_key(tmp_path, config, ["nf4", True], CPU)
    assert first == weight_key(tmp_path, config, ["nf4", True], CPU)
    others = {weight_key(tmp_path, config, ["nf4", False], CPU)}
    file.write_bytes(b"22")
    others.add(weight_key(tmp_path, config, ["nf4", True], CPU))
    os.utime(file, (1, 1))
    others.add(weight_key(tmp_path, config, ["nf4", True], CPU))
    (tmp_path / "config.json").write_text("{}")
    others.add(weight_key(tmp_path, config, ["nf4", True], CPU))
    assert len(others) == 4 and first not in others


def test_only_our_own_dataclasses_are_described() -> None:
    with pytest.raises(NotPlain):
        take_apart({"f": print}, [])
    with pytest.raises(NotPlain):
        put_together({"class": "subprocess:Popen", "fields": {}}, [])
    strided = torch.zeros(4, 4)[:, ::2]
    with pytest.raises(NotPlain, match="dense"):
        weight_cache._place([strided])
