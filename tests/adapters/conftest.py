"""Tiny bases and adapters for the tests: real ones made by PEFT, and hand-written ones with any fault in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adaplex_adapters.base_shape import BaseShape, LinearShape

LAYERS = 2
HIDDEN, KV, MLP = 32, 16, 48


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def llama_linears(layers: int = LAYERS, hidden: int = HIDDEN, kv: int = KV, mlp: int = MLP) -> dict[str, LinearShape]:
    """Module paths of a Llama in forward order."""
    found = {}
    for layer in range(layers):
        for name, out_features, in_features in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", mlp, hidden),
            ("mlp.up_proj", mlp, hidden),
            ("mlp.down_proj", hidden, mlp),
        ):
            found[f"model.layers.{layer}.{name}"] = LinearShape(out_features, in_features)
    return found


@pytest.fixture(scope="session")
def base() -> BaseShape:
    return BaseShape("tiny-llama", "llama", LAYERS, HIDDEN, 64, llama_linears())


@pytest.fixture(scope="session")
def make_base() -> Callable[..., BaseShape]:
    """A llama base with other widths or layers."""

    def make(**changed: int) -> BaseShape:
        linears = llama_linears(**changed)
        return BaseShape("other-llama", "llama", changed.get("layers", LAYERS), HIDDEN, 64, linears)

    return make


LoraWriter = Callable[..., Path]


@pytest.fixture
def write_lora(tmp_path: Path, base: BaseShape) -> LoraWriter:
    """Write a PEFT folder by hand: q_proj and v_proj of every layer by default, with any change."""
    count = 0

    def write(
        targets: tuple[str, ...] = ("q_proj", "v_proj"),
        rank: int = 4,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        config: Mapping[str, Any] | None = None,
        change: Callable[[dict[str, torch.Tensor]], None] | None = None,
        shape: BaseShape = base,
    ) -> Path:
        nonlocal count
        count += 1
        folder = tmp_path / f"lora{count}"
        folder.mkdir()
        random = torch.Generator().manual_seed(seed)
        tensors = {}
        for path, linear in shape.linears.items():
            if path.endswith(tuple(f".{target}" for target in targets)):
                a = torch.randn(rank, linear.in_features, generator=random)
                b = torch.randn(linear.out_features, rank, generator=random)
                tensors[f"base_model.model.{path}.lora_A.weight"] = a.to(dtype)
                tensors[f"base_model.model.{path}.lora_B.weight"] = b.to(dtype)
        if change is not None:
            change(tensors)
        fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": list(targets), **(config or {})}
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[[], Any]:
    """Makes the same random Llama every time (PEFT changes the model that it is given)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make() -> Any:
        torch.manual_seed(1)
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=HIDDEN,
                intermediate_size=MLP,
                num_hidden_layers=LAYERS,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=64,
                max_position_embeddings=64,
            )
        ).eval()

    return make


@pytest.fixture(scope="session")
def tiny_neox() -> Callable[[], Any]:
    """A random GPT-NeoX, whose q, k and v are one module."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    def make() -> Any:
        torch.manual_seed(2)
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(
                hidden_size=HIDDEN,
                intermediate_size=MLP,
                num_hidden_layers=LAYERS,
                num_attention_heads=4,
                vocab_size=64,
                max_position_embeddings=64,
            )
        ).eval()

    return make


@pytest.fixture(scope="session")
def shape_of() -> Callable[[Any], BaseShape]:
    """The shape of a transformers model: its linears without the head."""

    def shape(model: Any) -> BaseShape:
        head = model.get_output_embeddings()
        linears = {
            path: LinearShape(module.out_features, module.in_features)
            for path, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        }
        config = model.config
        return BaseShape("tiny", config.model_type, config.num_hidden_layers, config.hidden_size, 64, linears)

    return shape


@pytest.fixture
def save_peft(tmp_path: Path) -> Callable[[Any, Any], tuple[Path, Any]]:
    """Adapt a model by PEFT with random weights and save it: (folder, the PEFT model)."""

    def save(model: Any, config: Any) -> tuple[Path, Any]:
        from peft import get_peft_model

        adapted = get_peft_model(model, config)
        torch.manual_seed(3)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        folder = tmp_path / "peft"
        adapted.save_pretrained(folder)
        return folder, adapted.eval()

    return save
