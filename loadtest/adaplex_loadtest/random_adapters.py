"""Makes PEFT LoRA folders with random weights for any base, for benchmarks and tests. Owns nothing."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from adaplex_adapters.base_shape import BaseShape


def write_random_lora(
    folder: Path,
    shape: BaseShape,
    *,
    rank: int,
    seed: int,
    targets: tuple[str, ...] | None = None,
    scale: float = 0.02,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """One adapter on the modules whose last name is in `targets` (all linears when None); returns the folder.

    Both matrices are random, so that the adapter changes the output; `scale` is the deviation of B's entries.
    """
    names = tuple(sorted({path.rsplit(".", 1)[-1] for path in shape.linears})) if targets is None else targets
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, linear in shape.linears.items():
        if path.rsplit(".", 1)[-1] not in names:
            continue
        a = torch.randn(rank, linear.in_features, generator=generator) * linear.in_features**-0.5
        b = torch.randn(linear.out_features, rank, generator=generator) * scale
        tensors[f"base_model.model.{path}.lora_A.weight"] = a.to(dtype)
        tensors[f"base_model.model.{path}.lora_B.weight"] = b.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": shape.name,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(names),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    return folder
