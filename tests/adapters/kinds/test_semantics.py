"""What an adapter's parts mean, by the plain reference, is what PEFT computes from the same files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adaplex_adapters.reader import read_adapter
from support.adapter_reference import logits
from support.peft_kinds import PEFT_KINDS, targets_of
from support.tiny_models import CONFIGS

IDS = torch.tensor([[5, 9, 2, 31, 8, 60, 44, 3, 17], [1, 2, 3, 4, 5, 6, 7, 8, 9]])


@pytest.mark.parametrize("name", PEFT_KINDS)
def test_on_llama(name: str, save_kind: Any, tiny_llama: Any, full_shape: Any) -> None:
    folder, adapted = save_kind(name)
    adapter = read_adapter(folder, full_shape(tiny_llama()))
    with torch.no_grad():
        expected = adapted(IDS).logits[:, -IDS.shape[1] :]
    torch.testing.assert_close(logits(tiny_llama(), adapter, IDS), expected, atol=5e-6, rtol=1e-5)


FAMILIES = [
    "gpt_neox",
    "gpt2",
    "opt",
    "bloom",
    "gemma2",
    "gemma3",
    "phi3",
    "falcon-alibi",
    "qwen2",
    "llama-biases-tied",
]
FAMILIES += ["llama-biases-tied"]
FAMILY_KINDS = ["dora", "ia3", "prompt_tuning", "prefix_tuning", "lora embedding", "lora head", "lora saved"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FAMILY_KINDS)
def test_on_families(name: str, family: str, save_kind: Any, full_shape: Any) -> None:
    def make() -> Any:
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation="eager").eval()

    folder, adapted = save_kind(name, make(), targets_of(name, make()))
    adapter = read_adapter(folder, full_shape(make()))
    with torch.no_grad():
        expected = adapted(IDS).logits[:, -IDS.shape[1] :]
    found = logits(make(), adapter, IDS)
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("family", ["llama3", "gpt_neox", "gpt2", "opt", "bloom", "gemma2"])
@pytest.mark.parametrize("name", ["prompt_tuning", "prefix_tuning"])
def test_positions_while_generating(name: str, family: str, save_kind: Any, full_shape: Any) -> None:
    """PEFT's cached steps are at the positions that one pass over prompt and answer has."""

    def make() -> Any:
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation="eager").eval()

    folder, adapted = save_kind(name, make())
    adapter = read_adapter(folder, full_shape(make()))
    expected = adapted.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    chosen = logits(make(), adapter, expected[:, :-1]).argmax(-1)
    assert torch.equal(chosen[:, IDS.shape[1] - 1 :], expected[:, IDS.shape[1] :])


def test_the_copy_of_the_base_that_peft_saves(save_kind: Any, tiny_llama: Any, full_shape: Any) -> None:
    """Beside a LoRA of the embedding or the head; it must be told from what was trained, and come back."""
    for name, path in (("lora embedding", "model.embed_tokens"), ("lora head", "lm_head")):
        adapter = read_adapter(save_kind(name)[0], full_shape(tiny_llama()))
        assert adapter.base_copies.keys() == {path} and not adapter.replaced
        assert torch.equal(adapter.base_copies[path], dict(tiny_llama().named_modules())[path].weight)
        assert adapter.spec.parameters == sum(m.a.numel() + m.b.numel() for m in adapter.modules.values())
