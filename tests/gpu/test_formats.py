"""Every base format on CUDA: its linear against its dequantized weight, rows that keep their bits, and the same codes
and bytes as on the CPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adaplex_server.bases.describe import describe_base
from adaplex_server.model.base import Base, load_base
from adaplex_server.model.config import ModelConfig, parse_config
from adaplex_server.model.families import base_shape
from adaplex_server.model.formats.quantization import Quantization
from adaplex_server.model.linear import Linear

CPU = torch.device("cpu")
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 512,
    "intermediate_size": 1088,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FORMATS: dict[str, dict[str, Any]] = {
    "dense": {"quantize": "none"},
    "nf4": {"quantize": "nf4", "double_quant": False},
    "nf4 double": {"quantize": "nf4"},
    "nf4 blocks of 128": {"quantize": "nf4", "quant_block": 128},
    "nf4 blocks of 32": {"quantize": "nf4", "quant_block": 32},
    "fp4": {"quantize": "fp4", "double_quant": False},
    "fp4 double, blocks of 256": {"quantize": "fp4", "quant_block": 256},
    "int8": {"quantize": "int8"},
    "int8 without outliers": {"quantize": "int8", "int8_threshold": 0.0},
    "int8-absmax": {"quantize": "int8-absmax"},
    "int8-zeropoint": {"quantize": "int8-zeropoint"},
    "gptq": {
        "given": {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq_v2", "sym": False}
    },
    "gptq-8bit": {"given": {"quant_method": "gptq", "bits": 8, "group_size": 64, "checkpoint_format": "gptq_v2"}},
    "gptq-8bit, one group": {
        "given": {"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"}
    },
    "awq": {"given": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}},
}
TOLERANCE = {torch.bfloat16: 0.01, torch.float16: 0.002, torch.float32: 1e-5}


def _checkpoint(folder: Path, given: dict[str, Any] | None) -> ModelConfig:
    """Random weights of CONFIG's shape, dense or in GPTQ's or AWQ's words."""
    config = parse_config(CONFIG | ({"quantization_config": given} if given else {}), {}, "tiny")
    tensors = {name: torch.randn(97, 512) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tensors |= {
        name: torch.ones(512)
        for name in (
            "model.norm.weight",
            "model.layers.0.input_layernorm.weight",
            "model.layers.0.post_attention_layernorm.weight",
        )
    }
    for path, shape in base_shape(config).linears.items():
        n, k = shape.out_features, shape.in_features
        if given is None:
            tensors[f"{path}.weight"] = torch.randn(n, k) * k**-0.5
            continue
        bits, group = given["bits"], k if given["group_size"] == -1 else given["group_size"]
        groups = -(-k // group)
        words = (k * bits // 32, n) if given["quant_method"] == "gptq" else (k, n // 8)
        random = torch.iinfo(torch.int32)
        tensors[f"{path}.qweight"] = torch.randint(random.min, random.max, words, dtype=torch.int32)
        tensors[f"{path}.qzeros"] = torch.randint(random.min, random.max, (groups, n * bits // 32), dtype=torch.int32)
        tensors[f"{path}.scales"] = (torch.rand(groups, n) * 0.01 / (1 << bits) + 0.001).half()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return config


def _load(
    folder: Path, config: ModelConfig, settings: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> Base:
    options = {"quantize": "none", "double_quant": True} | {k: v for k, v in settings.items() if k != "given"}
    return load_base(folder, config=config, dtype=dtype, device=device, **options)


def _inputs(linear: Linear, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows with and without outliers."""
    x = torch.randn(40, linear.in_features)
    x[3, 7], x[9, 11], x[9, 200], x[30, 7] = 20.0, -8.0, 7.0, -30.0
    return x.to(device, dtype)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_linear_multiplies_with_its_weight(
    name: str, dtype: torch.dtype, device: torch.device, tmp_path: Path
) -> None:
    settings = FORMATS[name]
    config = _checkpoint(tmp_path, settings.get("given"))
    base = _load(tmp_path, config, settings, dtype, device)
    for linear in base.layers[0].linears.values():
        x = _inputs(linear, dtype, device)
        found = linear(x)
        wanted = x.double() @ linear.dequantized().double().t()
        error = ((found.double() - wanted).norm(dim=1) / wanted.norm(dim=1)).max()
        # LLM.int8 rounds the activations to eight bits as well, of which outliers leave the others few.
        eight = 0.05 if settings.get("int8_threshold") is None else 0.1
        assert error <= (eight if settings.get("quantize") == "int8" else TOLERANCE[dtype]), error
        if dtype != torch.float32:
            for rows in (1, 5, 17):
                assert torch.equal(linear(x[:rows].contiguous()), found[:rows]), rows


@pytest.mark.parametrize("name", [name for name in FORMATS if "gptq" not in name and name != "awq"])
def test_the_same_values_as_on_the_cpu(name: str, device: torch.device, tmp_path: Path) -> None:
    settings = FORMATS[name]
    config = _checkpoint(tmp_path, None)
    here = _load(tmp_path, config, settings, torch.float32, CPU)
    there = _load(tmp_path, config, settings, torch.bfloat16, device)
    for one, other in zip(here.layers[0].linears.values(), there.layers[0].linears.values(), strict=True):
        if name == "dense":
            assert torch.equal(one.dequantized().bfloat16(), other.dequantized().cpu().bfloat16())
        else:
            assert torch.equal(one.dequantized(), other.dequantized().cpu())


@pytest.mark.parametrize("name", ["nf4 double", "fp4", "int8", "int8-zeropoint", "gptq", "awq", "dense"])
def test_takes_the_memory_that_its_description_says(name: str, device: torch.device, tmp_path: Path) -> None:
    settings = FORMATS[name]
    config = _checkpoint(tmp_path, settings.get("given"))
    base = _load(tmp_path, config, settings, torch.bfloat16, device)
    wanted = Quantization(settings.get("quantize", "none"), settings.get("double_quant", True))
    described = describe_base(tmp_path, config, wanted, torch.bfloat16, step=0)
    assert described.format.name == base.format
    # Random zeros are never symmetric, and padding takes a little.
    assert described.weights * 0.97 <= base.nbytes() <= described.weights * 1.06


def test_llm_int8_rows_are_those_of_the_cpu(device: torch.device, tmp_path: Path) -> None:
    """Integer sums are exact: what differs is the rounding of the outliers' sums."""
    config = _checkpoint(tmp_path, None)
    settings = FORMATS["int8"]
    here = _load(tmp_path, config, settings, torch.float16, CPU).layers[0].linears["qkv"]
    there = _load(tmp_path, config, settings, torch.float16, device).layers[0].linears["qkv"]
    x = _inputs(here, torch.float16, CPU)
    plain = torch.randn(40, 512).clamp_(-5, 5).half()
    assert torch.equal(there(plain.to(device)).cpu(), here(plain))
    torch.testing.assert_close(there(x.to(device)).cpu(), here(x), rtol=2e-3, atol=2e-3)
