from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adaplex_adapters.errors import StorageFailed
from adaplex_adapters.training.result import round_adapter, save_adapter


def test_what_is_measured_is_what_is_saved() -> None:
    """Trained weights are rounded to the saved dtype before the loss is measured; frozen ones are left alone."""
    model = torch.nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    weight, bias = model.weight.detach().clone(), model.bias.clone()
    round_adapter(model, torch.bfloat16)
    assert torch.equal(model.weight, weight.bfloat16().float()) and not torch.equal(model.weight, weight)
    assert torch.equal(model.bias, bias)


def test_a_disk_that_refuses_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageFailed, match="Saving the trained adapter"):
        save_adapter(None, tmp_path / "file" / "out", "base")
