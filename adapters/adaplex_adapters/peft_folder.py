"""The files of an adapter in normalized form: still a PEFT folder, which PEFT and our own reader take back unchanged.

Scalings are written as alpha = scaling * rank. A scaling is a float32 and a rank a small integer, so the product is
exact in a double, and dividing again gives the same scaling to the last bit.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TypeVar

from adaplex_adapters.folder import TENSOR_FILE
from adaplex_adapters.peft_config import CONFIG_FILE
from adaplex_adapters.safetensors_file import serialize
from adaplex_adapters.spec import LoraAdapter
from adaplex_adapters.tensor_keys import keys_of

T = TypeVar("T", int, float)


def files_of(adapter: LoraAdapter) -> Iterator[tuple[str, Iterator[memoryview]]]:
    """(file name, its bytes piece by piece) of a PEFT folder with this adapter."""
    yield CONFIG_FILE, iter([memoryview(config_text(adapter).encode())])
    tensors = {}
    for path, key_a, key_b in keys_of(sorted(adapter.modules)):
        tensors[key_a], tensors[key_b] = adapter.modules[path].a, adapter.modules[path].b
    yield TENSOR_FILE, serialize(tensors)


def config_text(adapter: LoraAdapter) -> str:
    """adapter_config.json that names each module in full, with patterns only where a module differs from the most."""
    ranks = {path: module.a.shape[0] for path, module in adapter.modules.items()}
    alphas = {path: module.scaling * ranks[path] for path, module in adapter.modules.items()}
    rank, rank_pattern = _common(ranks)
    alpha, alpha_pattern = _common(alphas)
    config = {
        "alpha_pattern": {key: _number(value) for key, value in alpha_pattern.items()},
        "base_model_name_or_path": adapter.spec.base_model or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "target_modules": sorted(adapter.modules),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"


def _common(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """The value that most have (the smallest of several), and the others by an expression for one path only."""
    counts = Counter(values.values())
    common = min(counts, key=lambda value: (-counts[value], value))
    return common, {re.escape(path): values[path] for path in sorted(values) if values[path] != common}


def _number(value: float) -> int | float:
    """PEFT's configs write whole alphas as integers."""
    return int(value) if value.is_integer() and abs(value) < 1e15 else value
