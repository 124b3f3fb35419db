"""Every format from checkpoint to base: read as saved, or quantized in flight. The oracles are transformers with
bitsandbytes, and for GPTQ and AWQ the formats' own words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig

from adaplex_adapters.errors import StartupError
from adaplex_server.model.base import Base, load_base
from adaplex_server.model.config import read_config
from adaplex_server.model.families import module_paths
from adaplex_server.model.formats.quantization import Quantization
from adaplex_server.model.linear import Linear
from support.grouped_checkpoint import write_grouped

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("dense")
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    return folder


def _load(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Base:
    options: dict[str, Any] = {"quantize": "none", "double_quant": False}
    return load_base(folder, config=read_config(folder), dtype=dtype, device=CPU, **(options | changes))


def _linears(base: Base) -> list[tuple[tuple[str, ...], Linear]]:
    return [
        (module_paths(base.config, layer, name), linear)
        for layer, weights in enumerate(base.layers)
        for name, linear in weights.linears.items()
    ]


def _same_weights(one: Base, other: Base) -> bool:
    pairs = zip(_linears(one), _linears(other), strict=True)
    return all(torch.equal(mine.dequantized(), theirs.dequantized()) for (_, mine), (_, theirs) in pairs)


@pytest.mark.parametrize("block", [64, 128])
def test_fp4_equals_transformers_with_bitsandbytes(block: int, dense: Path, tmp_path: Path) -> None:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=settings, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    saved = _load(tmp_path)
    in_flight = _load(dense, quantize="fp4", double_quant=True, quant_block=block)
    assert saved.format == in_flight.format == "fp4-double"
    for paths, linear in _linears(saved):
        weights = [model.get_submodule(path).weight for path in paths]
        for weight in weights:
            weight.quant_state.dtype = torch.float32
        expected = torch.cat([bnb.dequantize_4bit(weight.data, weight.quant_state) for weight in weights])
        assert torch.equal(linear.dequantized(), expected)
    if block == 128:
        assert in_flight.nbytes() < _load(dense, quantize="fp4", double_quant=True).nbytes()


def test_llm_int8_equals_transformers_with_bitsandbytes(dense: Path, tmp_path: Path) -> None:
    settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=2.0)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=settings, dtype=torch.float16)
    model.save_pretrained(tmp_path)
    saved = _load(tmp_path, torch.float16)
    in_flight = _load(dense, torch.float16, quantize="int8", int8_threshold=2.0)
    assert saved.format == in_flight.format == "int8" and _same_weights(saved, in_flight)
    assert load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(1)).half()
    for (paths, mine), (_, theirs) in zip(_linears(saved), _linears(in_flight), strict=True):
        if mine.in_features != 128:
            continue
        alone = [torch.cat([model.get_submodule(path)(row[None])[0] for path in paths]) for row in x]
        torch.testing.assert_close(mine(x), torch.stack(alone), rtol=2e-3, atol=2e-3)
        assert torch.equal(mine(x), theirs(x))


@pytest.mark.parametrize("kind", ["int8-absmax", "int8-zeropoint"])
def test_weight_only_int8(kind: str, dense: Path) -> None:
    base, whole = _load(dense, quantize=kind), _load(dense)
    assert base.format == kind
    for (_, mine), (_, theirs) in zip(_linears(base), _linears(whole), strict=True):
        error = (mine.dequantized() - theirs.dequantized()).norm() / theirs.dequantized().norm()
        assert error < 0.012
        assert mine.nbytes() < 0.3 * theirs.nbytes()


def test_gpt2s_transposed_weights_are_quantized_as_linears(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=32, dtype=torch.float16)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path / "dense")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=settings, dtype=torch.float16)
    model.save_pretrained(tmp_path / "nf4")
    assert _same_weights(_load(tmp_path / "nf4"), _load(tmp_path / "dense", quantize="nf4"))


GROUPED: dict[str, tuple[int, dict[str, Any]]] = {
    "gptq": (4, {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}),
    "gptq-2bit": (2, {"quant_method": "gptq", "bits": 2, "group_size": 32, "checkpoint_format": "gptq_v2"}),
    "gptq-8bit": (8, {"quant_method": "gptq", "bits": 8, "group_size": 64, "desc_act": True, "sym": False}),
    "gptq-8bit v2": (8, {"quant_method": "gptq", "bits": 8, "group_size": 128, "checkpoint_format": "gptq_v2"}),
    "awq": (4, {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}),
}


@pytest.mark.parametrize("case", GROUPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_formats_mean_what_their_words_say(case: str, dtype: torch.dtype, dense: Path, tmp_path: Path) -> None:
    bits, quantization = GROUPED[case]
    meant = write_grouped(tmp_path, dense, quantization, bits)
    base = _load(tmp_path, dtype)
    assert base.format == case.partition(" ")[0]
    for paths, linear in _linears(base):
        expected = torch.cat([meant[path] for path in paths])
        assert torch.equal(linear.dequantized(), expected)
        x = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(9)).to(dtype)
        wanted = x.float() @ expected.T
        assert (linear(x).float() - wanted).norm() <= (1e-6 if dtype == torch.float32 else 0.008) * wanted.norm()


@pytest.mark.parametrize(("changes", "told"), [({"block": 100}, "blocks of 100"), ({"int8_threshold": -1.0}, "-1.0")])
def test_settings_that_cannot_be(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(StartupError, match=told):
        Quantization(**changes)
