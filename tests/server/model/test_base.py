"""Loading a base: what each format's linears multiply with, and what is refused. The oracle is transformers with
bitsandbytes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPTNeoXConfig, LlamaConfig, Qwen2Config, Qwen3Config

from adaplex_adapters.errors import StartupError
from adaplex_server.model.base import Base, load_base
from adaplex_server.model.config import read_config
from adaplex_server.model.families import module_paths
from adaplex_server.model.formats.dense import DenseLinear
from adaplex_server.model.formats.split import SplitLinear
from adaplex_server.model.linear import Linear
from adaplex_server.model.random_base import random_base

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def _checkpoint(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    return folder


def _load(folder: Path, **changes: Any) -> Base:
    options: dict[str, Any] = {"quantize": "none", "double_quant": True, "dtype": torch.float32, "device": CPU}
    return load_base(folder, config=read_config(folder), **(options | changes))


def _linears(base: Base) -> list[tuple[tuple[str, ...], Linear]]:
    return [
        (module_paths(base.config, layer, name), linear)
        for layer, weights in enumerate(base.layers)
        for name, linear in weights.linears.items()
    ]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory.mktemp("llama"), LlamaConfig(**SHAPE))


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SHAPE),
        LlamaConfig(**SHAPE | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        Qwen2Config(**SHAPE),
        Qwen3Config(**SHAPE, head_dim=32),
        GPTNeoXConfig(**{key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}),
    ],
    ids=["llama", "llama tied and biased", "qwen2", "qwen3", "gpt_neox"],
)
def test_dense_linears_are_the_checkpoints(tmp_path: Path, config: Any) -> None:
    folder = _checkpoint(tmp_path, config)
    tensors = load_file(folder / "model.safetensors")
    base = _load(folder)
    for paths, linear in _linears(base):
        assert torch.equal(linear.dequantized(), torch.cat([tensors[f"{path}.weight"] for path in paths]))
        bias = [tensors[f"{path}.bias"] for path in paths if f"{path}.bias" in tensors]
        zero = linear(torch.zeros(1, linear.in_features))[0]
        assert torch.equal(zero, torch.cat(bias) if bias else torch.zeros(linear.out_features))
    assert (base.head is base.embedding) == config.tie_word_embeddings
    assert base.format == "none"
    stored = sum(tensor.nbytes for tensor in tensors.values())
    assert base.nbytes() == stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharded", [False, True])
def test_checkpoints_of_each_type_and_shards(tmp_path: Path, dtype: torch.dtype, sharded: bool) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size="200KB" if sharded else "5GB")
    assert (tmp_path / "model.safetensors").exists() != sharded
    base = _load(tmp_path)
    expected = model.model.layers[1].mlp.down_proj.weight.float()
    assert torch.equal(base.layers[1].linears["down"].dequantized(), expected)
    assert torch.equal(base.final_norm.weight, model.model.norm.weight.float())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_equals_transformers_with_bitsandbytes(
    tmp_path: Path, double_quant: bool, in_flight: bool, dtype: torch.dtype
) -> None:
    dense = _checkpoint(tmp_path / "dense", LlamaConfig(**SHAPE), torch.bfloat16)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=settings, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "nf4")
    if in_flight:
        base = _load(dense, quantize="nf4", double_quant=double_quant, dtype=dtype)
    else:
        base = _load(tmp_path / "nf4", quantize="none", double_quant=not double_quant, dtype=dtype)
    assert base.format == ("nf4-double" if double_quant else "nf4")
    for paths, linear in _linears(base):
        parts = []
        for path in paths:
            weight = model.get_submodule(path).weight
            weight.quant_state.dtype = torch.float32
            parts.append(bnb.dequantize_4bit(weight.data, weight.quant_state))
        assert torch.equal(linear.dequantized(), torch.cat(parts))
    assert torch.equal(base.head, model.lm_head.weight.to(dtype))


def test_modules_left_out_of_quantization_stay_dense(tmp_path: Path, llama: Path) -> None:
    left_out = ["lm_head", "k_proj", "down_proj"]
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=left_out)
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=settings, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    base = _load(tmp_path, dtype=torch.bfloat16)
    layer = base.layers[0].linears
    assert isinstance(layer["down"], DenseLinear)
    assert isinstance(layer["qkv"], SplitLinear)
    assert torch.equal(layer["qkv"].parts[1].dequantized(), model.model.layers[0].self_attn.k_proj.weight.float())


def test_a_quantized_head_is_dequantized(tmp_path: Path, llama: Path) -> None:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["none"])
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=settings, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    weight = model.lm_head.weight
    assert torch.equal(_load(tmp_path).head, bnb.dequantize_4bit(weight.data, weight.quant_state).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["nf4", "fp4", "gptq", "int8", "int8-absmax", "int8-zeropoint", "none"])
def test_calls_multiply_row_by_row_and_write_nothing(llama: Path, format: Any, dtype: torch.dtype) -> None:
    base = random_base(read_config(llama), format, dtype=dtype, device=CPU)
    before = _digest(base)
    for paths, linear in _linears(base):
        random = torch.Generator().manual_seed(len(paths))
        x = torch.randn(40, linear.in_features, generator=random).to(dtype)
        kept = x.clone()
        whole = linear(x)
        expected = x.float() @ linear.dequantized().T
        # LLM.int8 rounds the activations to eight bits as well.
        tolerance = 0.03 if format == "int8" else 0.01 if dtype == torch.bfloat16 else 1e-5
        assert (whole.float() - expected).norm() <= tolerance * expected.norm()
        assert 0.3 < float(whole.float().std()) < 3
        for rows in (1, 2, 3, 8, 17):
            assert torch.equal(linear(x[7 : 7 + rows]), whole[7 : 7 + rows]), rows
        assert torch.equal(x, kept)
    assert _digest(base) == before


def _digest(base: Base) -> str:
    """Over every tensor that can be reached from the base."""
    found = hashlib.sha256()
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(value.contiguous().view(torch.uint8).numpy().tobytes())
        elif hasattr(value, "__dataclass_fields__"):
            for name in value.__dataclass_fields__:
                visit(getattr(value, name))
        elif isinstance(value, tuple):
            for item in value:
                visit(item)
        elif hasattr(value, "values") and id(value) not in seen:
            for item in value.values():
                visit(item)

    visit(base)
    return found.hexdigest()


def _with_config(folder: Path, llama: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = json.loads((llama / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "af4"}, "af4"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "awq", "bits": 8}, "8 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
        ({"quant_method": "awq", "bits": 4, "zero_point": False}, "zero_point"),
        ({"quant_method": "gptq", "bits": 5}, "5 bits"),
        ({"quant_method": "gptq", "bits": 3}, "gptq_v2"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 48}, "group_size 48"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"x": {"bits": 8}}}, "dynamic"),
    ],
)
def test_formats_that_are_not_read_are_named(tmp_path: Path, llama: Path, quantization: Any, message: str) -> None:
    _with_config(tmp_path, llama, quantization_config=quantization)
    with pytest.raises(StartupError, match=message):
        _load(tmp_path)


def _saved_with(folder: Path, llama: Path, change: Any) -> Path:
    _with_config(folder, llama)
    tensors = load_file(llama / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model\.norm\.weight is \[3\]"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(3)}), "1 tensors .* model.layers.2.mlp"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(128)}), "a bias that"),
    ],
)
def test_missing_misshapen_and_left_over_tensors_are_named(
    tmp_path: Path, llama: Path, change: Any, message: str
) -> None:
    with pytest.raises(StartupError, match=message):
        _load(_saved_with(tmp_path, llama, change))


def test_what_follows_from_the_config_may_be_left_over(tmp_path: Path, llama: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(128)

    _load(_saved_with(tmp_path, llama, change))


def test_progress_ends_at_one(llama: Path) -> None:
    told: list[float] = []
    _load(llama, progress=lambda text, fraction: told.append(fraction))
    assert told == sorted(told)
    assert told[-1] == 1.0
