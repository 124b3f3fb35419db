"""The rows of data against the modules that transformers builds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from adaplex_server.model.config import read_config
from adaplex_server.model.families import FAMILIES, base_shape, linear_targets, module_paths, norm_path
from support.tiny_models import CONFIGS, load_tiny, save_tiny


@pytest.mark.parametrize("kind", CONFIGS)
def test_names_every_module_of_transformers(kind: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, kind)
    config = read_config(tmp_path)
    family = FAMILIES[config.family]
    # Transformers calls every head lm_head in memory, whatever its name in the checkpoint.
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and n != "lm_head"}
    ours = base_shape(config).linears
    assert {n: tuple(m.weight.shape)[:: -1 if family.transposed else 1] for n, m in linears.items()} == {
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
    if family.embedding_norm is not None:
        norms.add(family.embedding_norm)
    assert {family.embedding, family.final_norm, *norms} <= set(modules)
    assert family.positions is None or family.positions in modules
    if not config.tied_head:
        assert f"{family.head}.weight" in load_file(tmp_path / "model.safetensors")
    assert norms | {family.final_norm} == {n for n, m in modules.items() if "Norm" in type(m).__name__}
    assert family.head_bias == any(n.startswith("lm_head") and n.endswith("bias") for n, _ in model.named_parameters())


@pytest.mark.parametrize("kind", ["gpt2", "bloom"])
def test_checkpoints_of_a_bare_model(kind: str, tmp_path: Path) -> None:
    """The files of "gpt2" and of BLOOM on the hub have no "transformer." before their names."""
    model = save_tiny(tmp_path, kind)
    whole = load_tiny(tmp_path)
    model.transformer.save_pretrained(tmp_path)
    assert "wpe.weight" in load_file(tmp_path / "model.safetensors") or kind == "bloom"
    bare = load_tiny(tmp_path)
    assert torch.equal(whole.layers[1].linears["qkv"].dequantized(), bare.layers[1].linears["qkv"].dequantized())


def test_spans_follow_one_another(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3")
    targets = linear_targets(read_config(tmp_path))
    assert list(targets) == ["qkv", "o", "gate_up", "down"]
    assert targets["qkv"].names == ("q_proj", "k_proj", "v_proj")
    assert targets["qkv"].spans == ((0, 128), (128, 192), (192, 256))
    assert (targets["o"].in_features, targets["o"].out_features) == (128, 64)
