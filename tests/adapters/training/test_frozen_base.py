from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from adaplex_adapters.errors import StartupError
from adaplex_adapters.training.frozen_base import load_frozen_base


def load_4bit(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def test_the_dense_copies_hold_what_the_4bit_base_multiplies_with(base_folder: Path) -> None:
    import bitsandbytes

    four_bit = load_4bit(base_folder)
    base = load_frozen_base(base_folder, "tiny", "cpu")
    compared = 0
    for path, layer in four_bit.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            wanted = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert torch.equal(base.model.get_submodule(path).weight, wanted.to(base.model.dtype)), path
            compared += 1
    assert compared == 14
    ids = torch.arange(40).view(2, 20)
    ours, theirs = (model(input_ids=ids).logits.float() for model in (base.model, four_bit))
    assert float((ours - theirs).norm() / theirs.norm()) < 0.01  # bfloat16 sums in another order


def test_gradients_are_those_of_the_4bit_base(base_folder: Path) -> None:
    """QLoRA's gradient goes through the dequantized weight: the copy gives the same one."""
    grads = []
    for model in (load_4bit(base_folder), load_frozen_base(base_folder, "tiny", "cpu").model):
        embedded = model.get_input_embeddings()(torch.arange(12).view(1, 12)).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.float().square().sum().backward()
        grads.append(embedded.grad.float())
    assert torch.nn.functional.cosine_similarity(grads[0].flatten(), grads[1].flatten(), dim=0) > 0.9995


def test_everything_is_frozen(base_folder: Path) -> None:
    base = load_frozen_base(base_folder, "tiny", "cpu")
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.hidden_size == 64


def test_what_is_no_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"config\.json"):
        load_frozen_base(tmp_path, "x", "cpu")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(StartupError, match="'awq' is not supported"):
        load_frozen_base(tmp_path, "x", "cpu")
