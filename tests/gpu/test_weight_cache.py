"""A GPU's weights come back from the disk bit for bit, where they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adaplex_loadtest.shapes import shape_config
from adaplex_server.model.base_tensors import take_apart
from adaplex_server.model.random_base import random_base
from adaplex_server.model.weight_cache import WeightCache

CUDA = torch.device("cuda")


@pytest.mark.parametrize("form", ["none", "nf4", "gptq"])
def test_they_come_back(tmp_path: Path, form: str) -> None:
    base = random_base(shape_config("135m"), form, dtype=torch.bfloat16, device=CUDA)  # type: ignore[arg-type]
    cache = WeightCache(tmp_path, "a")
    cache.save(base)
    found = cache.load(base.config, CUDA)
    assert found is not None and found.format == base.format and found.nbytes() == base.nbytes()
    mine: list[torch.Tensor] = []
    theirs: list[torch.Tensor] = []
    assert take_apart(base.layers, mine) == take_apart(found.layers, theirs)
    for ours, other in zip(mine, theirs, strict=True):
        assert ours.device == other.device and ours.stride() == other.stride() and torch.equal(ours, other)
    x = torch.randn(33, base.config.hidden_size, dtype=torch.bfloat16, device=CUDA)
    for one, other in zip(base.layers, found.layers, strict=True):
        assert torch.equal(one.linears["qkv"](x), other.linears["qkv"](x))
