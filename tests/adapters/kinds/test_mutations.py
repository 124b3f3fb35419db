"""Thousands of mutated folders of all kinds: each is refused with InvalidAdapter, or read as a whole adapter.

Never another exception, never a hang, and never an adapter that claims to be the original while it does something
else, or to be another while it does the same. `ADAPLEX_MUTATIONS=600:7 pytest ...` makes 600 of each file, from seed 7.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.errors import InvalidAdapter
from adaplex_adapters.peft_folder import files_of
from adaplex_adapters.reader import read_adapter
from adaplex_adapters.spec import Adapter
from support.bottleneck_folder import NAMED, write_bottleneck
from support.mutations import config_mutations, same_content, tensor_mutations
from support.peft_kinds import PEFT_KINDS

ROUNDS, SEED = (int(part) for part in os.environ.get("ADAPLEX_MUTATIONS", "150:0").split(":"))
NAMES = [*PEFT_KINDS, *NAMED]


def try_read(folder: Path, base: BaseShape) -> Adapter | None:
    try:
        found = read_adapter(folder, base)
    except InvalidAdapter as error:
        assert error.message.isprintable() and error.message.isascii() and len(error.message) < 6000
        return None
    assert all(torch.isfinite(tensor).all() for _, tensor in found.tensors())
    return found


@pytest.fixture(scope="module")
def shape(tiny_llama: Any, full_shape: Any) -> BaseShape:
    return full_shape(tiny_llama())


@pytest.fixture(params=NAMES)
def folder(request: Any, save_kind: Any, tmp_path: Path) -> Iterator[Path]:
    name = request.param
    made = write_bottleneck(tmp_path / "library", name) if name in NAMED else save_kind(name)[0]
    for leftover in made.glob("README.md"):
        leftover.unlink()
    yield made
    shutil.rmtree(made)


@pytest.mark.timeout(120 + ROUNDS)
def test_mutated_folders(folder: Path, shape: BaseShape, tmp_path: Path) -> None:
    original = read_adapter(folder, shape)
    rng = random.Random(f"{folder.name} {SEED}")
    (weights,) = folder.glob("*.safetensors")
    refused = accepted = 0
    for file, mutations in ((weights, tensor_mutations), (folder / "adapter_config.json", config_mutations)):
        good = file.read_bytes()
        source = mutations(good, rng)
        for _ in range(ROUNDS):
            file.write_bytes(next(source))
            found = try_read(folder, shape)
            refused += found is None
            accepted += found is not None
            if found is not None:
                assert same_content(found, original) == (found.spec.revision == original.spec.revision)
                assert_kept(found, shape, tmp_path / "kept")
        file.write_bytes(good)
    assert refused > ROUNDS // 2 and accepted > 0
    assert read_adapter(folder, shape).spec == original.spec


def assert_kept(adapter: Adapter, shape: BaseShape, folder: Path) -> None:
    """What was accepted is one that the store can keep."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, pieces in files_of(adapter):
        (folder / name).write_bytes(b"".join(pieces))
    assert read_adapter(folder, shape).spec == adapter.spec


def test_enough_of_them() -> None:
    assert 2 * ROUNDS * len(NAMES) >= 2000
