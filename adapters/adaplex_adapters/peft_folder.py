"""The files of an adapter in normalized form, which our own reader takes back unchanged; and PEFT too, but for
bottlenecks, which have the layout of the `adapters` library.

Scalings are written as alpha = scaling * rank. A scaling is a float32 and a rank a small integer, so the product is
exact in a double, and dividing again gives the same scaling to the last bit.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch

from adaplex_adapters.composition import KIND_COMPOSITION
from adaplex_adapters.folder import TENSOR_FILE
from adaplex_adapters.kinds.bottleneck import normalized_bottleneck
from adaplex_adapters.kinds.composition import joined, parts_of
from adaplex_adapters.kinds.prompt_fields import SAVED
from adaplex_adapters.peft_config import KIND_FIELD
from adaplex_adapters.peft_fields import CONFIG_FILE
from adaplex_adapters.safetensors_file import serialize
from adaplex_adapters.spec import (
    CONVERTED_KINDS,
    KIND_BOTTLENECK,
    KIND_DORA,
    KIND_IA3,
    KIND_P_TUNING,
    KIND_PREFIX_TUNING,
    KIND_PROMPT_TUNING,
    Adapter,
)
from adaplex_adapters.tensor_keys import PREFIX

T = TypeVar("T", int, float)
Tensors = dict[str, torch.Tensor]


def files_of(adapter: Adapter) -> Iterator[tuple[str, Iterator[memoryview]]]:
    """(file name, its bytes piece by piece) of a folder with this adapter."""
    config, tensors = _normalized(adapter)
    yield CONFIG_FILE, iter([memoryview(_text(config).encode())])
    yield TENSOR_FILE, serialize(tensors)


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"


def _normalized(adapter: Adapter) -> tuple[dict[str, Any], Tensors]:
    kind = adapter.spec.kind
    if kind == KIND_COMPOSITION:
        parts = [_normalized(part) for part in parts_of(adapter)]
        return parts[0] if len(parts) == 1 else joined(parts)
    if kind == KIND_BOTTLENECK:
        return normalized_bottleneck(adapter)
    common = {
        "base_model_name_or_path": adapter.spec.base_model or None,
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
    }
    if kind in (KIND_PROMPT_TUNING, KIND_P_TUNING, KIND_PREFIX_TUNING):
        config, tensors = _prompt(adapter)
    elif kind == KIND_IA3:
        config, tensors = _ia3(adapter)
    else:
        config, tensors = _lora(adapter)
    for path, tensor in (*adapter.replaced.items(), *adapter.base_copies.items()):
        # Beside a LoRA of the same module, PEFT calls the copy of the base's weight its base layer's.
        tensors[f"{PREFIX}{path}.{'base_layer.' if path in adapter.modules else ''}weight"] = tensor
    if adapter.replaced:
        config["modules_to_save"] = sorted(adapter.replaced)
    return common | config, tensors


def _lora(adapter: Adapter) -> tuple[dict[str, Any], Tensors]:
    """A config that names each module in full, with patterns only where a module differs from the most."""
    tensors: Tensors = {}
    for path in sorted(adapter.modules):
        module, key = adapter.modules[path], f"{PREFIX}{path}."
        if module.embedding:
            tensors |= {f"{key}lora_embedding_A": module.a, f"{key}lora_embedding_B": module.b}
        else:
            tensors |= {f"{key}lora_A.weight": module.a, f"{key}lora_B.weight": module.b}
        if module.magnitude is not None:
            tensors[f"{key}lora_magnitude_vector"] = module.magnitude
    ranks = {path: module.a.shape[0] for path, module in adapter.modules.items()}
    rank, rank_pattern = _common(ranks)
    alpha, alpha_pattern = _common({path: module.scaling * ranks[path] for path, module in adapter.modules.items()})
    config: dict[str, Any] = {
        "alpha_pattern": {key: _number(value) for key, value in alpha_pattern.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "target_modules": sorted(adapter.modules),
        "use_dora": adapter.spec.kind == KIND_DORA,
        "use_rslora": False,
    }
    if adapter.spec.kind in CONVERTED_KINDS:
        config[KIND_FIELD] = adapter.spec.kind
    return config, tensors


def _ia3(adapter: Adapter) -> tuple[dict[str, Any], Tensors]:
    tensors: Tensors = {}
    for path in sorted(adapter.scales):
        scale = adapter.scales[path]
        tensors[f"{PREFIX}{path}.ia3_l"] = scale.vector.reshape((1, -1) if scale.on == "input" else (-1, 1))
    config = {
        "feedforward_modules": sorted(path for path, scale in adapter.scales.items() if scale.on == "input"),
        "peft_type": "IA3",
        "target_modules": sorted(adapter.scales),
    }
    return config, tensors


def _prompt(adapter: Adapter) -> tuple[dict[str, Any], Tensors]:
    config: dict[str, Any] = {"num_transformer_submodules": 1, "num_virtual_tokens": adapter.spec.virtual_tokens}
    if adapter.prefix is not None:
        layers, _, tokens, heads, head_dim = adapter.prefix.shape
        config |= {
            "num_attention_heads": heads,
            "num_layers": layers,
            "peft_type": "PREFIX_TUNING",
            "prefix_projection": False,
            "token_dim": heads * head_dim,
        }
        return config, {SAVED: adapter.prefix.permute(2, 0, 1, 3, 4).reshape(tokens, -1).contiguous()}
    assert adapter.soft_prompt is not None
    kind = "P_TUNING" if adapter.spec.kind == KIND_P_TUNING else "PROMPT_TUNING"
    config |= {"peft_type": kind, "token_dim": adapter.soft_prompt.shape[1]}
    return config, {SAVED: adapter.soft_prompt}


def _common(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """The value that most have (the smallest of several), and the others by an expression for one path only."""
    counts = Counter(values.values())
    common = min(counts, key=lambda value: (-counts[value], value))
    return common, {re.escape(path): values[path] for path in sorted(values) if values[path] != common}


def _number(value: float) -> int | float:
    """PEFT's configs write whole alphas as integers."""
    return int(value) if value.is_integer() and abs(value) < 1e15 else value
