"""The rows of data against the modules that transformers builds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adaplex_server.model.config import read_config
from adaplex_server.model.families import FAMILIES, base_shape, linear_targets, module_paths, norm_path
from support.tiny_models import CONFIGS, save_tiny


@pytest.mark.parametrize("kind", CONFIGS)
def test_names_every_module_of_transformers(kind: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, kind)
    config = read_config(tmp_path)
    family = FAMILIES[config.family]
    # Transformers calls every head lm_head in memory, whatever its name in the checkpoint.
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    ours = base_shape(config).linears
    assert {n: (m.out_features, m.in_features) for n, m in linears.items()} == {
        n: (shape.out_features, shape.in_features) for n, shape in ours.items()
    }
    biased = {
        path
        for layer in range(config.num_layers)
        for name in config.biased_linears
        for path in module_paths(config, layer, name)
    }
    assert biased == {n for n, m in linears.items() if m.bias is not None}
    norms = {norm_path(config, layer, norm) for layer in range(config.num_layers) for norm in family.norms}
    modules = dict(model.named_modules())
    assert {family.embedding, family.final_norm, *norms} <= set(modules)
    if not config.tied_head:
        assert f"{family.head}.weight" in load_file(tmp_path / "model.safetensors")
    assert norms | {family.final_norm} == {n for n, m in modules.items() if "Norm" in type(m).__name__}


def test_spans_follow_one_another(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3")
    targets = linear_targets(read_config(tmp_path))
    assert list(targets) == ["qkv", "o", "gate_up", "down"]
    assert targets["qkv"].names == ("q_proj", "k_proj", "v_proj")
    assert targets["qkv"].spans == ((0, 128), (128, 192), (192, 256))
    assert (targets["o"].in_features, targets["o"].out_features) == (128, 64)
