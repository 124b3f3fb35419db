"""Bases on a GPU: the same weights as on the CPU, products that are theirs, and no more memory on the way than said."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adaplex_server.bases.gptq_quantizer import GptqRecipe, quantize
from adaplex_server.model.base import Base, load_base
from adaplex_server.model.config import ModelConfig, parse_config
from adaplex_server.model.families import FAMILIES, linear_targets, module_paths, norm_path
from adaplex_server.model.random_base import random_base

CUDA = torch.device("cuda")
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 1,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
}


def _write(folder: Path, recipe: GptqRecipe | None, **changes: Any) -> ModelConfig:
    """A random checkpoint, dense or in GPTQ."""
    config = parse_config(
        CONFIG | changes | ({} if recipe is None else {"quantization_config": recipe.config()}), {}, "test"
    )
    random = torch.Generator().manual_seed(0)
    family = FAMILIES[config.family]
    tensors = {
        f"{path}.weight": torch.randn(config.vocab_size, config.hidden_size, generator=random).bfloat16()
        for path in (family.embedding, family.head)
    }
    ones = torch.ones(config.hidden_size)
    tensors |= {f"{path}.weight": ones.clone() for path in (family.final_norm,)}
    for layer in range(config.num_layers):
        tensors |= {f"{norm_path(config, layer, norm)}.weight": ones.clone() for norm in family.norms}
        for linear, targets in linear_targets(config).items():
            scale = torch.linspace(0.5, 2, targets.in_features)
            for path, (begin, end) in zip(module_paths(config, layer, linear), targets.spans, strict=True):
                weight = (torch.randn(end - begin, targets.in_features, generator=random) * 0.05).bfloat16()
                if recipe is None:
                    tensors[f"{path}.weight"] = weight
                else:
                    stored = quantize(weight, torch.diag(scale), recipe)
                    tensors |= {f"{path}.{key}": tensor for key, tensor in stored.items()}
    save_file(tensors, folder / "model.safetensors")
    return config


def _load(folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, **options: Any) -> Base:
    options = {"quantize": "nf4", "double_quant": True} | options
    return load_base(folder, config=config, dtype=dtype, device=device, **options)


CASES: dict[str, tuple[GptqRecipe | None, dict[str, Any]]] = {
    "dense": (None, {"quantize": "none"}),
    "nf4": (None, {"double_quant": False}),
    "nf4, double": (None, {}),
    "gptq": (GptqRecipe(64), {}),
    "gptq, asymmetric, act-order": (GptqRecipe(32, symmetric=False, act_order=True), {}),
    "gptq, one group": (GptqRecipe(-1), {}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_weights_equal_the_cpus_and_products_are_theirs(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    recipe, options = CASES[case]
    config = _write(tmp_path, recipe)
    expected = _load(tmp_path, config, torch.float32, torch.device("cpu"), **options)
    base = _load(tmp_path, config, dtype, CUDA, **options)
    assert base.format == expected.format
    for name, linear in base.layers[0].linears.items():
        weight = linear.dequantized()
        exact = expected.layers[0].linears[name].dequantized()
        assert weight.is_cuda
        assert weight.dtype == torch.float32
        if options.get("quantize") == "none":
            exact = exact.to(dtype).float()
        # The mean that double quantization takes off is summed in another order on the GPU.
        torch.testing.assert_close(weight.cpu(), exact, rtol=1e-6 if case == "nf4, double" else 0, atol=0)
        x = torch.randn(70, linear.in_features, generator=torch.Generator().manual_seed(1)).to(CUDA, dtype)
        found = linear(x)
        wanted = x.double() @ weight.double().T
        tolerance = {torch.float32: 1e-5, torch.float16: 0.002, torch.bfloat16: 0.012}[dtype]
        assert (found.double() - wanted).norm() < tolerance * wanted.norm()
        if dtype != torch.float32:
            for rows in (1, 2, 7, 33):
                assert torch.equal(linear(x[3 : 3 + rows]), found[3 : 3 + rows]), rows


@pytest.mark.parametrize("case", ["nf4, double", "gptq, asymmetric, act-order"])
def test_loading_needs_little_more_than_the_result(tmp_path: Path, case: str) -> None:
    recipe, options = CASES[case]
    config = _write(
        tmp_path, recipe, num_hidden_layers=6, hidden_size=1024, num_attention_heads=16, num_key_value_heads=4
    )
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    base = _load(tmp_path, config, torch.bfloat16, CUDA, **options)
    largest = max(targets.in_features * targets.out_features for targets in linear_targets(config).values())
    held = torch.cuda.memory_allocated() - before
    assert held < 1.05 * base.nbytes() + (4 << 20)
    # One fused linear in float32 and a few pieces.
    assert torch.cuda.max_memory_allocated() - before < held + 4 * largest + (64 << 20)


@pytest.mark.parametrize("form", ["nf4", "gptq", "none"])
def test_random_bases_keep_activations_finite(form: Any) -> None:
    base = random_base(parse_config(CONFIG, {}, "test"), form, device=CUDA)
    for linear in base.layers[0].linears.values():
        x = torch.randn(4, linear.in_features, device=CUDA, dtype=torch.bfloat16)
        assert 0.3 < float(linear(x).float().std()) < 3
