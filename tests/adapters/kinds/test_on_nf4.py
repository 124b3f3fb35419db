"""On a base in 4 bits, PEFT's adapters mean what the reference says of the dequantized base, a DoRA's norms too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adaplex_adapters.reader import read_adapter
from support.adapter_reference import logits
from support.tiny_models import save_tiny

IDS = torch.tensor([[5, 9, 2, 31, 8, 60, 44, 3, 17]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    made = tmp_path_factory.mktemp("base")
    save_tiny(made, "llama3")
    return made


def quantized(folder: Path) -> Any:
    from bitsandbytes.nn import Linear4bit

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # or else evaluation repacks the weights in place
    return model


def dequantized(folder: Path) -> Any:
    """A dense model with the values that the quantized one multiplies with."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = dict(dense.named_modules())
    with torch.no_grad():
        for path, layer in quantized(folder).named_modules():
            if isinstance(layer, Linear4bit):
                layers[path].weight.copy_(dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    return dense


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "vera", "prompt_tuning", "prefix_tuning"])
def test_on_nf4(name: str, folder: Path, save_kind: Any, full_shape: Any) -> None:
    made, adapted = save_kind(name, quantized(folder))
    dense = dequantized(folder)
    adapter = read_adapter(made, full_shape(dense))
    with torch.no_grad():
        expected = adapted(IDS).logits[:, -IDS.shape[1] :]
    found = logits(dense, adapter, IDS)
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)
