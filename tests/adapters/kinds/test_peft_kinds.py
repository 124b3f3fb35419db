"""Every kind that PEFT saves: read, kept and read again as the same, and what PEFT itself takes from it is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adaplex_adapters.peft_folder import files_of
from adaplex_adapters.reader import read_adapter, read_unfitted
from adaplex_adapters.spec import Adapter
from support.peft_kinds import PEFT_KINDS

IDS = torch.arange(3, 15)[None]


def write(adapter: Adapter, folder: Path) -> Path:
    folder.mkdir()
    for name, pieces in files_of(adapter):
        (folder / name).write_bytes(b"".join(pieces))
    return folder


@pytest.mark.parametrize("name", PEFT_KINDS)
def test_normalized_is_the_same_to_us_and_to_peft(
    name: str, save_kind: Any, tiny_llama: Any, full_shape: Any, tmp_path: Path
) -> None:
    from peft import PeftModel

    folder, adapted = save_kind(name)
    shape = full_shape(tiny_llama())
    adapter = read_adapter(folder, shape)
    assert adapter.spec.kind == name.split(" ")[0]
    normalized = write(adapter, tmp_path / "normalized")
    again = read_adapter(normalized, shape)
    assert again.spec == adapter.spec and read_unfitted(normalized).spec == adapter.spec
    with torch.no_grad():
        expected = adapted(IDS).logits
        found = PeftModel.from_pretrained(tiny_llama(), normalized).eval()(IDS).logits
        plain = tiny_llama()(IDS).logits
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)
    assert found.shape == plain.shape[:1] + expected.shape[1:]
    if adapter.soft_prompt is None:
        assert not torch.allclose(plain, expected, atol=1e-4)
