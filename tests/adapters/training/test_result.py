from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adaplex_adapters.errors import StorageFailed
from adaplex_adapters.training.methods.adapter import AdapterFiles
from adaplex_adapters.training.result import clear_leftovers, save_adapter

FILES = AdapterFiles({"x": torch.zeros(2)}, {"peft_type": "LORA"}, "adapter_model.safetensors", "adapter_config.json")


def test_a_disk_that_refuses_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageFailed, match="Saving the trained adapter"):
        save_adapter(FILES, tmp_path / "file" / "out")


def test_what_stands_beside_the_adapter_comes_and_goes_with_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save_adapter(FILES, out, lambda folder: (folder / "README.md").write_text("first") and None)
    save_adapter(FILES, out)
    assert sorted(p.name for p in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]

    def fails(folder: Path) -> None:
        raise OSError(28, "no space")

    with pytest.raises(StorageFailed, match="disk is full"):
        save_adapter(FILES, out, fails)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"] and len(list(out.iterdir())) == 2


def test_what_a_killed_process_left_goes_away(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in (".out.abcdefgh", ".out.replaced-12", ".outer.abcdefgh", ".out.json"):
        (tmp_path / name).mkdir()
    save_adapter(FILES, out)
    clear_leftovers(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.json", ".outer.abcdefgh", "out"]
