"""Tiny models and folders of every kind that PEFT saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from adaplex_adapters.base_shape import BaseShape, LinearShape
from support.peft_kinds import peft_config


@pytest.fixture(scope="session")
def full_shape() -> Callable[[Any], BaseShape]:
    """The shape of a tiny transformers model, with embedding, head and key heads."""

    def shape(model: Any) -> BaseShape:
        names = {module: path for path, module in model.named_modules()}
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        linears = {
            path: LinearShape(module.out_features, module.in_features)
            for path, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        }
        for path, module in model.named_modules():
            if isinstance(module, Conv1D):
                linears[path] = LinearShape(*module.weight.shape[::-1])
        config = model.config
        kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        return BaseShape(
            name="tiny",
            family=config.model_type,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            linears=linears,
            embedding=names[embedding],
            head=names[head],
            tied_head=bool(config.tie_word_embeddings),
            num_kv_heads=kv_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        )

    return shape


@pytest.fixture
def save_kind(tmp_path: Path, tiny_llama: Callable[[], Any]) -> Callable[..., tuple[Path, Any]]:
    """Make an adapter of PEFT_KINDS with random weights and save it: (folder, the PEFT model in evaluation)."""

    def save(name: str, model: Any = None, changed: Mapping[str, Any] | None = None) -> tuple[Path, Any]:
        from peft import get_peft_model

        torch.manual_seed(5)
        adapted = get_peft_model(model if model is not None else tiny_llama(), peft_config(name, changed or {}))
        with torch.no_grad():
            for parameter in (p for p in adapted.parameters() if p.requires_grad):
                parameter.add_(torch.randn_like(parameter) * 0.2)
        folder = tmp_path / name.replace(" ", "_")
        adapted.save_pretrained(folder)
        return folder, adapted.eval()

    return save
