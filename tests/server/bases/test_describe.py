"""What a base costs: parameters as transformers counts them, bits as the formats keep them, and what fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from adaplex_adapters.errors import StartupError
from adaplex_server.bases.describe import GIB, BaseDescription, describe_base, read_description_config
from adaplex_server.cli.main import app
from adaplex_server.kernels import nf4
from adaplex_server.model.base import load_base
from adaplex_server.model.formats.quantization import Quantization
from support.tiny_models import CONFIGS, save_tiny

LLAMA_65B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "torch_dtype": "float16",
}


def _folder(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(LLAMA_65B | changes))
    return folder


def _describe(folder: Path, quantization: Quantization, dtype: torch.dtype = torch.bfloat16) -> BaseDescription:
    found, config = read_description_config(folder)
    return describe_base(found, config, quantization, dtype, step=GIB)


@pytest.mark.parametrize("kind", CONFIGS)
def test_parameters_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    config = CONFIGS[kind]()
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = _describe(tmp_path, Quantization())
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.checkpoint == 0


@pytest.mark.parametrize("kind", ["llama2", "gpt2", "gemma3"])
def test_dense_weights_are_those_of_a_loaded_base(kind: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, kind)
    folder, config = read_description_config(tmp_path / "config.json")
    base = load_base(
        folder, config=config, quantize="none", double_quant=False, dtype=torch.float32, device=torch.device("cpu")
    )
    found = _describe(tmp_path, Quantization("none"), torch.float32)
    assert found.weights == base.nbytes() and found.checkpoint > 0


def test_65b_in_48_gb(tmp_path: Path) -> None:
    found = _describe(_folder(tmp_path), Quantization())
    assert 65.0e9 < found.parameters < 65.5e9
    assert found.format.single == 4.5 and found.format.double == pytest.approx(4.127, abs=0.001)
    assert found.format.stored == found.format.double
    assert found.linear_parameters * (4.5 - found.format.stored) / 8 == pytest.approx(3.0e9, rel=0.02)
    fits = {fit.memory // GIB: fit for fit in found.fits}
    assert fits[48].fits and not fits[32].fits and fits[48].tokens > 4000
    assert fits[48].tokens_beside_adapters < fits[48].tokens
    assert found.kv_token == 2 * 80 * 8192 * 2


def test_stored_bits_are_what_quantizing_takes() -> None:
    weight = torch.randn(512, 4096)
    for double, expected in ((False, 4.5), (True, 4 + 8 / 64 + 32 / (64 * 256))):
        found = nf4.quantize(weight, double_quant=double)
        per_row = 8 * 8 * 512 if double else 0  # where the rows' groups begin, and their offsets
        assert (found.nbytes() * 8 - per_row) / weight.numel() == expected


@pytest.mark.parametrize(
    ("given", "name", "stored"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq", 4.15625),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "gptq-8bit", 8 + 24 / 8192),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, "awq", 4.15625),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8", 8 + 32 / 8192),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4", 4.5),
    ],
)
def test_a_quantized_checkpoint_is_described_as_it_is(
    given: dict[str, Any], name: str, stored: float, tmp_path: Path
) -> None:
    found = _describe(_folder(tmp_path, quantization_config=given), Quantization("none"))
    assert (found.format.name, found.format.stored) == (name, pytest.approx(stored))


def test_the_command(tmp_path: Path) -> None:
    _folder(tmp_path)
    table = CliRunner().invoke(app, ["bases", "describe", str(tmp_path)], catch_exceptions=False)
    assert table.exit_code == 0 and "0.37 less" in table.stdout and "48.00 GiB" in table.stdout
    arguments = [
        "bases",
        "describe",
        str(tmp_path / "config.json"),
        "--json",
        "--memory",
        "40GiB",
        "--quantize",
        "int8",
    ]
    found = json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)
    assert found["format"]["name"] == "int8" and [fit["fits"] for fit in found["fits"]] == [False]


def test_a_path_that_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="neither a folder"):
        read_description_config(tmp_path / "absent")
    with pytest.raises(StartupError, match=r"no config\.json"):
        read_description_config(tmp_path)
